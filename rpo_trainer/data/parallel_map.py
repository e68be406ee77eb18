"""The same work on many batches, in several processes where it pays and is safe.

The processes are forks, as those of data loaders are: they begin at once, with the tokenizer as it is,
and without running the user's script again. They touch no device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rpo_trainer.runtime.cores import usable_cores

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Result = TypeVar("Result")

MOST = 16  # processes; beyond it the one that collects the results is the slowest
_work: Callable[[Any], Any] | None = None


def processes_for(batches: int) -> int:
    """How many processes are worth it: one for few batches, else the cores that are ours."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(usable_cores(), batches // 4, MOST))


def map_batches(
    work: Callable[[Batch], Result], batches: Sequence[Batch], processes: int
) -> Iterator[Result]:
    """`work` of each batch, in their order; its errors are raised here.

    Where a process is killed, for want of memory for example, the rest is done in this one.
    """
    done = 0
    if processes > 1:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, fork, _begin, (work,)) as pool:
            try:
                for result in pool.map(_run, batches):
                    yield result
                    done += 1
            except BrokenProcessPool:
                logger.warning(
                    "a process that tokenised was killed; the rest is done in one process"
                )
    yield from map(work, batches[done:])


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # The parent is told to stop, and it stops these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the parent are not here


def _run(batch: Any) -> Any:
    assert _work is not None
    return _work(batch)
