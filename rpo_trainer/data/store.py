"""`DataStore`: a directory of prepared data, an entry per content key, each complete or absent.

    FOLDER/KEY/entry.json     names and sizes of its files; written last
    FOLDER/.KEY.partial       an entry that is being built, or whose process was killed or has failed
    FOLDER/.KEY.lock          held by the process that builds it

An entry is built by one process and mapped by all. The next process that needs an unfinished entry
continues it.
"""

from __future__ import annotations

import atexit
import errno
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

from filelock import FileLock, Timeout

from rpo_trainer.data.rows import Row
from rpo_trainer.runtime.files import atomic_write, make_folder, remove_empty

logger = logging.getLogger(__name__)

_ENTRY = "entry.json"
# Incremented when the same sources and settings result in other rows, tokens or files.
_FORMAT = 1
_WAIT_SECONDS = 10.0  # between log lines while another process builds an entry
_BATCH = 1000  # rows
_NOT_WRITABLE = (PermissionError, NotADirectoryError, FileExistsError)


class DataStore:
    """Prepared data by content key.

    Args:
        folder: the directory of the entries, created when the first is built; None, or a directory that
            cannot be written: a temporary directory that is removed when the process ends.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._own: Path | None = None
        self._new: list[Path] = []  # directories created for the first entry, the innermost first

    def find(self, key: str) -> Path | None:
        """Return the directory of a complete entry; None if there is none."""
        for folder in self._folders():
            entry = folder / key
            if _is_complete(entry):
                with suppress(OSError):  # a read-only file system
                    os.utime(entry)
                return entry
        return None

    def entry(self, key: str, build: Callable[[Path], None], what: str) -> Path:
        """Return the directory of an entry, which is built first if it is absent.

        Args:
            build: writes the entry's files to a directory, which may have files of an unfinished build.
            what: what is prepared, for messages.

        Raises:
            OSError: the file system is full or fails.
        """
        if (found := self.find(key)) is not None:
            return found
        folder = self._writable()
        lock = folder / f".{key}.lock"
        with _locked(lock, what):
            if (found := self.find(key)) is not None:  # another process has built it
                return found
            partial, entry = folder / f".{key}.partial", folder / key
            partial.mkdir(exist_ok=True)
            try:
                build(partial)
            except Exception:
                with suppress(OSError):  # something was written, which the next build uses
                    partial.rmdir()
                    lock.unlink(missing_ok=True)
                    remove_empty(self._new)
                raise
            sizes = {
                path.relative_to(partial).as_posix(): path.stat().st_size
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            atomic_write(
                partial / _ENTRY,
                json.dumps({"version": _version(), "what": what, "files": sizes}, indent=1),
            )
            shutil.rmtree(entry, ignore_errors=True)  # damaged
            os.replace(partial, entry)
            with suppress(OSError):  # whoever waits for it finds the entry
                lock.unlink(missing_ok=True)
        return entry

    def collect(self, unused_since: float) -> None:
        """Remove the entries, complete or not, that have not been used since this time (`time.time()`)."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            key = path.name.removeprefix(".").removesuffix(".partial")
            if not path.is_dir() or path.stat().st_mtime >= unused_since:
                continue
            lock = FileLock(self.folder / f".{key}.lock")
            try:
                lock.acquire(timeout=0)
            except (Timeout, OSError):
                continue  # it is being built
            try:
                logger.debug("removing prepared data that are no longer used: %s", path)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)

    def _folders(self) -> Iterator[Path]:
        if self.folder is not None:
            yield self.folder
        if self._own is not None:
            yield self._own

    def _writable(self) -> Path:
        """Return the directory for new entries."""
        if self._own is None and self.folder is not None:
            try:
                self._new = make_folder(self.folder) or self._new
                if os.access(self.folder, os.W_OK | os.X_OK):
                    return self.folder
                reason: object = "permission denied"
            except OSError as error:
                if not isinstance(error, _NOT_WRITABLE) and error.errno != errno.EROFS:
                    raise
                reason = error.strerror or error
            logger.warning(
                "%s cannot be written (%s): prepared data are kept in a temporary directory, for this "
                "process only", self.folder, reason,
            )  # fmt: skip
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(prefix="rpo-trainer-data-"))
            atexit.register(shutil.rmtree, self._own, ignore_errors=True)
        return self._own


def _version() -> list[Any]:
    try:
        package = importlib.metadata.version("rpo-trainer")
    except importlib.metadata.PackageNotFoundError:  # imported from a directory
        package = ""
    return [package, _FORMAT]


def _is_complete(entry: Path) -> bool:
    try:
        content = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if content["version"] != _version():
            return False
        for name, size in content["files"].items():
            if (entry / name).stat().st_size != size:
                raise ValueError(f"{name} does not have {size} bytes")
    except (FileNotFoundError, NotADirectoryError) as error:
        if entry.is_dir():
            logger.warning("%s is damaged (%s): it is prepared again", entry, error)
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): it is prepared again", entry, error)
        return False
    return True


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock; log a line now and then while another process holds it."""
    lock = FileLock(path)
    began = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_WAIT_SECONDS)
            break
        except Timeout:
            waited = time.monotonic() - began
            logger.info("%s: another process prepares it (waiting for %.0f s)", what, waited)
    try:
        yield
    finally:
        lock.release()


class StoredRows(Sequence[Row]):
    """Rows in a memory-mapped Arrow file, parsed when they are read.

    Args:
        path: a file of `write_stored_rows`.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        self._texts = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["row"]

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row: Row = json.loads(self._texts[index].as_py())
        return row

    def __iter__(self) -> Iterator[Row]:
        for batch in self._texts.chunks:
            for text in batch.to_pylist():
                yield json.loads(text)


def write_stored_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON-compatible rows for `StoredRows`."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    schema = pa.schema({"row": pa.large_string()})
    batch: list[str] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def flush() -> None:
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema))
            batch.clear()

        for row in rows:
            batch.append(json.dumps(row))
            if len(batch) == _BATCH:
                flush()
        if batch:
            flush()
