"""Trackers lie outside of a run: where one fails, the run goes on, and says so."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

logger = logging.getLogger(__name__)


def harmless_trackers(handler: CallbackHandler, report_to: Any) -> None:
    """A tracker of transformers that raises is told nothing more; training goes on.

    Args:
        report_to: of the training arguments.
    """
    kinds: Any = get_reporting_integration_callbacks(report_to)  # type: ignore[no-untyped-call]
    for callback in handler.callbacks:
        if isinstance(callback, tuple(kinds)):
            _guard(callback)


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
