"""The run directory: checked, created, and locked for one run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rpo_trainer.errors import RunError
from rpo_trainer.runtime.files import (
    atomic_write,
    make_folder,
    remove_empty,
)
from rpo_trainer.stages.record import CHAIN_FILE

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_HOLDER = ".lock-holder"


def check_run_dir(run_dir: Path) -> None:
    """Check that the directory is a run directory, empty, or absent.

    Raises:
        RunError: it contains something else, or cannot be read.
    """
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise RunError(
                "the run directory is a file",
                code="run.not-a-directory",
                where=str(run_dir),
                fix="choose another --run-dir",
            )
        others = (
            [p for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.is_dir() else []
        )
        ours = (run_dir / CHAIN_FILE).is_file()
    except (OSError, ValueError) as error:
        raise _unusable("read", error, run_dir) from error
    if others and not ours:
        raise RunError(
            f"not an rpo-trainer run directory: contains {others[0].name}",
            code="run.not-a-run-directory",
            where=str(run_dir),
            fix="give an empty or new directory with --run-dir",
        )


def _unusable(how: str, error: Exception, run_dir: Path) -> RunError:
    return RunError(
        f"the run directory cannot be {how}: {getattr(error, 'strerror', None) or error}",
        code="run.unusable-directory",
        where=str(run_dir),
        fix="choose another --run-dir, or change its permissions",
    )


def open_run_dir(run_dir: Path) -> list[Path]:
    """Create the directory, or check that it is a run directory.

    Returns:
        The directories that were created, innermost first.

    Raises:
        RunError: it contains something else, or is not writable.
    """
    check_run_dir(run_dir)
    new: list[Path] = []
    try:
        new = make_folder(run_dir)
        probe = run_dir / ".write-test"
        probe.write_text("")
        probe.unlink()
    except (OSError, ValueError) as error:
        remove_empty(new)
        raise _unusable("written", error, run_dir) from error
    return new


@contextmanager
def locked(run_dir: Path, *, new: Sequence[Path] = ()) -> Iterator[None]:
    """Hold the lock of the run directory; it is released however the process ends.

    Args:
        new: directories created for this run: removed if nothing was written into them.
    """
    lock = FileLock(run_dir / _LOCK)
    holder = run_dir / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = _holder(holder) or "another process"
        raise RunError(
            f"the run directory is in use by {who}",
            code="run.locked",
            where=str(run_dir),
            why="two runs in one directory would mix their checkpoints",
            fix="wait until it ends, stop it, or choose another --run-dir",
        ) from error
    except OSError as error:
        raise RunError(
            f"the run directory cannot be locked: {error.strerror or error}",
            code="run.unusable-lock",
            where=str(run_dir / _LOCK),
            fix="remove this file or directory, or choose another --run-dir",
        ) from error
    if holder.is_file():
        logger.warning(
            "previous process of %s (%s) died; taking over its lock", run_dir, _holder(holder)
        )
    try:
        try:
            atomic_write(holder, f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise _unusable("written", error, run_dir) from error
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        with suppress(OSError):  # the directory may be gone
            if {path.name for path in run_dir.iterdir()} <= {_LOCK}:  # nothing was done
                (run_dir / _LOCK).unlink(missing_ok=True)  # safe: the lock is still held
        lock.release()
        remove_empty(new)


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
