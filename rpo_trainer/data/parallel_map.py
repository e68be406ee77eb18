"""Map a function over batches, in several processes if that is faster.

The processes are started anew, not forked: a fork can hang if this process has threads, an accelerator or
process groups. They do not import the user's script, which needs no `if __name__ == "__main__"`, and use no
device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from rpo_trainer.runtime.cores import usable_cores

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Result = TypeVar("Result")

MOST = 16  # processes; with more, the process that collects the results is the bottleneck
ROWS_EACH = 10_000  # fewer rows take less time than the imports of a new process
_PARENT_SECONDS = 1.0  # between two checks whether the parent process is alive
_QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}  # of a process without torch
_pickled = b""
_work: Callable[[Any], Any] | None = None


def processes_for(rows: int, *, alone: bool = False) -> int:
    """Return the number of processes to use for `rows` rows: at most one per available core.

    Args:
        alone: the other local ranks wait for this one, so that it may use their cores.
    """
    if multiprocessing.current_process().daemon:
        return 1
    return max(1, min(usable_cores(divided=not alone), rows // ROWS_EACH, MOST))


def map_batches(
    work: Callable[[Batch], Result],
    batches: Iterable[Batch],
    processes: int,
    *,
    torch: bool = True,
) -> Generator[Result, None, None]:
    """Yield `work(batch)` for each batch, in order. Exceptions of `work` are raised here.

    At most `processes` + 1 batches are held at a time. If a worker process is killed, for lack of memory for
    example, this process does the rest. The processes end with the generator: close it if it is not
    exhausted.

    Args:
        torch: False: `work` runs without torch, the import of which takes longest; transformers then does not
            find it in the new processes.
    """
    given = iter(batches)
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    pickled = _picklable(work) if processes > 1 else None
    if pickled is not None:
        from loky import ProcessPoolExecutor  # type: ignore[import-untyped, unused-ignore]
        from loky.process_executor import (  # type: ignore[import-untyped, unused-ignore]
            BrokenProcessPool,
        )

        pool = ProcessPoolExecutor(
            processes, initializer=_begin, initargs=(pickled, os.getpid(), torch),
            env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **_QUIET},
        )  # fmt: skip
        finished = False
        try:
            for batch in islice(given, processes + 1):
                waiting.append((batch, pool.submit(_run, batch)))
            while waiting:
                result = waiting[0][1].result()
                waiting.popleft()
                for batch in islice(given, 1):
                    # Before the result is yielded: the processes continue while the caller runs.
                    waiting.append((batch, _submitted(pool, batch)))
                yield result
            finished = True
        except BrokenProcessPool:
            logger.warning("a tokenizer process was killed; tokenizing the rest in one process")
        finally:
            pool.shutdown(wait=True, kill_workers=not finished)
    rest = [batch for batch, _ in waiting]
    waiting.clear()
    yield from map(work, chain(_popped(rest), given))


def _submitted(pool: Any, batch: Any) -> Any:
    """Return the future of a batch; if the pool is broken, one that raises the error when its turn comes."""
    from concurrent.futures import Future

    try:
        return pool.submit(_run, batch)
    except RuntimeError as error:  # the base class of the errors of a broken pool
        failed: Any = Future()
        failed.set_exception(error)
        return failed


def _popped(batches: list[Batch]) -> Iterator[Batch]:
    batches.reverse()
    while batches:
        yield batches.pop()


def _picklable(work: Callable[[Any], Any]) -> bytes | None:
    """Return the pickled work; None, with a warning, if it cannot be sent to another process."""
    import cloudpickle  # type: ignore[import-untyped, unused-ignore]

    try:
        return bytes(cloudpickle.dumps(work))
    except Exception as error:  # of the `__reduce__` of any class
        logger.warning("tokenizing in one process: the tokenizer cannot be pickled (%s)", error)
        return None


def _begin(pickled: bytes, parent: int, torch: bool) -> None:
    """Prepare a worker process. The parent handles signals and stops its workers."""
    global _pickled
    _pickled = pickled
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    if os.name == "posix":  # elsewhere the id of the parent process does not change when it ends
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the parent process has been killed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _run(batch: Any) -> Any:
    global _work, _pickled
    if _work is None:
        _work, _pickled = pickle.loads(_pickled), b""
    return _work(batch)
