"""SIGTERM and SIGINT: a run stops after a complete checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from rpo_trainer.errors import StoppedBySignal
from rpo_trainer.runtime import distributed

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """SIGTERM or SIGINT: the step in hand is finished, a checkpoint written, the exit code is 75.

    While a stage trains (`busy`), the first signal is only noted; after the last step the output
    is still written. At any other time nothing would be lost, and the first signal ends the run at
    once, as the second always does.

    Of several processes one may get the signal alone: they tell each other at every step's end, so
    that all save the same step; outside of training, at the next point where they meet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.busy = False
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals while it is entered; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a loader's worker, which has inherited this handler: its parent decides
        again = self.received is not None
        self.received = signal.Signals(number)
        if again or not (self.busy or distributed.world_size() > 1):
            self._raise_if_stopped()
        logger.warning(
            "%s: finishing the step and saving (once more to stop at once)", self.received.name
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What a signal raised may have been swallowed (in a finalizer, by a library).
        self.raise_if_stopped()
        self.busy = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed() is not None:
            control.should_save = True
            control.should_training_stop = True

    def output_written(self) -> None:
        """The stage is safe on disk: a signal that came meanwhile ends the run now."""
        self.busy = False
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """StoppedBySignal if a signal has come, to any process; all of them call it."""
        self._agreed()
        self._raise_if_stopped()

    def _agreed(self) -> signal.Signals | None:
        number = distributed.all_reduce_max(self.received or 0)
        self.received = signal.Signals(number) if number else None
        return self.received

    def _raise_if_stopped(self) -> None:
        if self.received is not None:
            raise StoppedBySignal(
                f"stopped by {self.received.name}",
                code="run.stopped-by-signal",
                why="what was finished before it is on disk: checkpoints, sampled rows, outputs of stages",
                fix="run the same command again: it resumes where it stopped",
            )
