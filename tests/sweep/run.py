"""The sweep over many families, in separate processes: a crash or a hang ends one case, not the sweep."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from tests.families import FAMILIES, VARIANTS
from tests.sweep.measure import Result, measure

SECONDS = 120.0  # of one case
_IMPORTS = 60.0  # additional seconds for the first answer of a process
_CASES_EACH = 50  # of one process, whose memory grows with the classes it imports

Case = tuple[str, bool]  # name, wide


def all_cases(names: Sequence[str] = (), reaches: Sequence[bool] = (False, True)) -> list[Case]:
    """The cases of these families and variants; all of them by default."""
    return [(name, wide) for wide in reaches for name in names or (*FAMILIES, *VARIANTS)]


def sweep(cases: Sequence[Case], *, jobs: int = 1, seconds: float = SECONDS) -> Iterator[Result]:
    """The records of `measure`, as they come. Adapters and reward models are part of narrow cases.

    Args:
        jobs: processes, each with one thread.
        seconds: limit of a case; beyond it the case's result is `crash`.
    """
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_serve, args=(waiting, done.put, seconds), daemon=True)
        for _ in range(min(jobs, len(cases)))
    ]
    for thread in threads:
        thread.start()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    for _ in cases:
        yield done.get() | versions
    for thread in threads:
        thread.join()


def _serve(
    waiting: queue.SimpleQueue[Case], done: Callable[[Result], None], seconds: float
) -> None:
    worker = Worker()
    while True:
        try:
            case = waiting.get_nowait()
        except queue.Empty:
            return worker.stop()
        done(worker.ask(case, seconds))


class Worker:
    """A process that measures one case after another; restarted after a crash."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None

    def ask(self, case: Case, seconds: float) -> Result:
        """Return the record of a case; a `crash` if the process ends or takes longer."""
        if self.process is None:
            self.start()
        why = f"not done after {seconds:g} s"
        try:
            self.pipe.send(case)
            if self.pipe.poll(seconds + (_IMPORTS if self.cases == 0 else 0.0)):
                self.cases += 1
                answer: Result = self.pipe.recv()
                if self.cases >= _CASES_EACH:
                    self.stop()
                return answer
        except (EOFError, OSError):
            self.process.join()
            why = f"its process ended with exit code {self.process.exitcode}"
        self.stop()
        name, wide = case
        reach = "wide" if wide else "narrow"
        return {"name": name, "reach": reach, "result": "crash", "reason": why}

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.cases = 0
        self.process = self.context.Process(target=_measure_all, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """End the process, which has no more work once the pipe is closed."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(5.0)
            self.process.kill()  # it hangs
            self.process.join()
            self.process = None


def quiet() -> None:
    """Use one thread, and suppress output of libraries."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("rpo_trainer").handlers = []
    logging.getLogger("rpo_trainer").propagate = False


def _measure_all(pipe: Connection) -> None:
    quiet()
    while True:
        try:
            name, wide = pipe.recv()
        except EOFError:
            return
        pipe.send(measure(name, wide, beside=not wide))
