"""SIGTERM and SIGINT: stop a run after a complete checkpoint."""

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
    """On SIGTERM or SIGINT, finishes the current step, writes a checkpoint, and exits with code 75.

    While a stage trains (`busy`), the first signal is only recorded; after the last step the output is
    still written. At any other time nothing would be lost, and the first signal ends the run
    immediately, as a second one always does.

    Of several processes, only one may get the signal: they exchange it at the end of every step, so
    that all save the same step, and outside of training at the next synchronization.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.busy = False
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the context; only possible in the main thread of a process."""
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
            return  # a data loader worker that inherited this handler
        again = self.received is not None
        self.received = signal.Signals(number)
        if again or not (self.busy or distributed.world_size() > 1):
            self._raise_if_stopped()
        logger.warning(
            "%s: finishing this step and saving a checkpoint (repeat to stop immediately)",
            self.received.name,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An exception raised by the handler may have been swallowed (in a finalizer, by a library).
        self.raise_if_stopped()
        self.busy = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed() is not None:
            control.should_save = True
            control.should_training_stop = True

    def output_written(self) -> None:
        """Stop now if a signal has arrived: the stage is complete on disk."""
        self.busy = False
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """Raise StoppedBySignal if any process has received a signal; called by all of them."""
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
                why="checkpoints, sampled rows and outputs of stages are on disk",
                fix="run the same command again to resume",
            )
