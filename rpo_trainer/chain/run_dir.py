"""The run directory: checked, created, and locked for one run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rpo_trainer.errors import RunError
from rpo_trainer.plan.disk import existing
from rpo_trainer.runtime.files import (
    atomic_write,
    make_folder,
    remove_empty,
)
from rpo_trainer.runtime.lock_holder import HOLDER_FILE, holder_text, read_holder
from rpo_trainer.stages.prepare import DATA_FOLDER
from rpo_trainer.stages.record import CHAIN_FILE

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_REPLACED = ".replaced"  # added to the name of a run directory while it is being replaced


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
        is_run_dir = (run_dir / CHAIN_FILE).is_file()
    except (OSError, ValueError) as error:
        raise _unusable("read", error, run_dir) from error
    if others and not is_run_dir:
        raise RunError(
            f"not an rpo-trainer run directory: contains {others[0].name}",
            code="run.not-a-run-directory",
            where=str(run_dir),
            fix="give an empty or new directory with --run-dir",
        )


def check_writable(run_dir: Path) -> None:
    """Raise RunError if the run directory cannot be written, or cannot be created."""
    folder = existing(run_dir)
    if not folder.is_dir():
        raise _unusable("written", NotADirectoryError(f"{folder} is a file"), run_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        error = PermissionError(f"permission denied for {folder}")
        raise _unusable("written", error, run_dir)


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
    holder = run_dir / HOLDER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = read_holder(run_dir) or "another process"
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
            "previous process of %s (%s) died; taking over its lock",
            run_dir,
            read_holder(run_dir),
        )
    try:
        try:
            atomic_write(holder, holder_text())
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


class ReplacedRun:
    """A run directory that another run replaces: moved aside, then deleted or restored.

    It is deleted once the new run has passed its checks (`delete`), and restored if these fail, so that
    a mistake in the recipe does not delete the old results.

    Raises:
        RunError: the directory is not a run directory, is in use, or cannot be moved.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._aside = run_dir.with_name(f"{run_dir.resolve().name}{_REPLACED}")
        if self._aside.exists() and not run_dir.exists():
            self.put_back()  # a process died while it was moved aside
        check_run_dir(run_dir)
        if not run_dir.is_dir():
            return
        try:
            with locked(run_dir):
                pass  # no other process is in it
            if not run_dir.is_dir():
                return  # it was empty
            if self._aside.exists():
                shutil.rmtree(self._aside)
            os.replace(run_dir, self._aside)
            self._move_data(self._aside, run_dir)
        except OSError as error:
            raise _unusable("replaced", error, run_dir) from error

    def delete(self) -> None:
        """Delete the old run directory."""
        if self._aside.exists():
            shutil.rmtree(self._aside)
            logger.info("deleted the previous run in %s", self.run_dir)

    def put_back(self) -> None:
        """Move the old run directory back, unless it was deleted or the new one has content."""
        if self._aside.exists() and not (self.run_dir / CHAIN_FILE).exists():
            if self.run_dir.exists():
                self._move_data(self.run_dir, self._aside)
                shutil.rmtree(self.run_dir)
            os.replace(self._aside, self.run_dir)

    @staticmethod
    def _move_data(old: Path, new: Path) -> None:
        """Move prepared data, which depend on their sources and not on the run."""
        if (old / DATA_FOLDER).is_dir():
            new.mkdir(exist_ok=True)
            os.replace(old / DATA_FOLDER, new / DATA_FOLDER)
