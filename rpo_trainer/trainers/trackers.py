"""Trackers lie outside of a run: where one fails, the run goes on, and says so."""

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
    """The trackers that `report_to` names; one that raises is told nothing more, and training goes on.

    Inside, `report_to` is empty, so that the Trainer made there adds none of its own: it tells of its
    making before anybody could guard them.
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
                    "the tracker %s has failed (%s: %s): it is told nothing more. The run goes on, and "
                    "metrics.jsonl has everything",
                    type(tracker).__name__, type(error).__name__, error,
                )  # fmt: skip
                return None

        return call

    for name in events:
        setattr(tracker, name, guarded(getattr(tracker, name)))
