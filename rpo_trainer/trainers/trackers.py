"""Fault-tolerant trackers: if one fails, training continues with a warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

logger = logging.getLogger(__name__)


@contextmanager
def fault_tolerant_callbacks(args: TrainingArguments) -> Iterator[list[TrainerCallback]]:
    """Yield the trackers of `report_to`; if one raises, it is disabled, and training continues.

    Within the context `report_to` is empty, so that a Trainer that is created there does not add its own
    trackers.
    """
    report_to = args.report_to
    kinds: Any = get_reporting_integration_callbacks(report_to)  # type: ignore[no-untyped-call]
    trackers = [kind() for kind in kinds]
    for tracker in trackers:
        _guard(tracker)
    args.report_to = []
    try:
        yield trackers
    finally:
        args.report_to = report_to


def _guard(tracker: Any) -> None:
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    failed: list[Exception] = []

    def guarded(event: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(event)
        def call(*args: Any, **kwargs: Any) -> Any:
            if failed:
                return None
            try:
                return event(*args, **kwargs)
            except Exception as error:
                failed.append(error)
                logger.warning(
                    "the tracker %s failed (%s: %s) and is disabled; training continues, and metrics.jsonl "
                    "has all metrics",
                    type(tracker).__name__, type(error).__name__, error,
                )  # fmt: skip
                return None

        return call

    for name in events:
        setattr(tracker, name, guarded(getattr(tracker, name)))
