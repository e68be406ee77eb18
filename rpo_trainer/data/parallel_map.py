"""Map a function over batches, in several processes if that is faster and safe.

The processes are forked, like those of data loaders: they start quickly, share the tokenizer, and do not run
the user's script again. They use no device.
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

MOST = 16  # processes; with more, the process that collects the results is the bottleneck
_work: Callable[[Any], Any] | None = None


def processes_for(batches: int) -> int:
    """Return the number of processes to use: one for few batches, otherwise the number of available cores."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(usable_cores(), batches // 4, MOST))


def map_batches(
    work: Callable[[Batch], Result], batches: Sequence[Batch], processes: int
) -> Iterator[Result]:
    """Yield `work(batch)` for each batch, in order. Exceptions of `work` are raised here.

    If a worker process is killed, for lack of memory for example, this process does the rest.
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
                logger.warning("a tokenizer process was killed; tokenizing the rest in one process")
    yield from map(work, batches[done:])


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # The parent handles signals and stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork does not have the parent's threads


def _run(batch: Any) -> Any:
    assert _work is not None
    return _work(batch)
