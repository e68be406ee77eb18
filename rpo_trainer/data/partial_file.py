"""The file beside a file to be, which takes the results of its rows one by one: `FILE.partial`.

Each line is by itself: [key of rows and settings, index of the row, its fields, digest of these three].
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from rpo_trainer.errors import RunError

logger = logging.getLogger(__name__)

Fields = dict[str, Any]

_SYNC_SECONDS = 1.0  # a kill loses nothing that was written; a power cut at most so much


def partial_path(path: Path, rank: int = 0) -> Path:
    """Where a process's results for `path` are until it is whole."""
    return path.with_name(f"{path.name}.partial" + (f".{rank}" if rank else ""))


def partial_paths(path: Path) -> list[Path]:
    """The partial files of all processes: while there is one, the work is not finished."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.partial*"), reverse=True)


def read_partials(path: Path, key: str, total: int) -> dict[int, Fields]:
    """The results for `path` by index, of all its partial files.

    Args:
        key: of the rows and settings.
        total: rows; indices beyond are left out.

    Raises:
        RunError: a result of other rows or settings, or something that is not a file.
    """
    found: dict[int, Fields] = {}
    for partial in partial_paths(path):
        if not partial.is_file():
            raise RunError(
                "this is not a file of unfinished work",
                code="output.partial-not-a-file",
                where=str(partial),
                why="the results are kept under this name until all are there",
                fix="remove it, or name another output",
            )
        results, _ = _read(partial)
        if any(own != key for own, _, _ in results):
            raise RunError(
                "there is unfinished work of other rows or settings",
                code="output.partial-mismatch",
                where=str(partial),
                why="continuing would mix the two in one file",
                fix="give the rows and settings that it began with, remove it, or name another output",
            )
        found |= {index: fields for _, index, fields in results if 0 <= index < total}
    return found


def discard_partials(path: Path, key: str) -> None:
    """Delete the unfinished work for `path` that was made of other rows or settings."""
    for partial in partial_paths(path):
        if partial.is_file() and any(own != key for own, _, _ in _read(partial)[0]):
            partial.unlink()


class PartialFile:
    """The append-only file of one process's results; there is none before the first."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()

    def _open(self) -> BinaryIO:
        results, damaged = _read(self.path) if self.path.exists() else ([], 0)
        if damaged:
            logger.warning(
                "%s is damaged: %d of its lines are not used, and their rows made again",
                self.path, damaged,
            )  # fmt: skip
        # Written anew, not cut at the first damaged line: the results after it may have cost hours.
        staged = self.path.with_name(f".{self.path.name}")
        staged.write_bytes(b"".join(line(*result) for result in results))
        os.replace(staged, self.path)
        return self.path.open("ab")

    def write(self, index: int, fields: Fields) -> None:
        """One result, out of this process when it returns."""
        if self._file is None:
            self._file = self._open()
        self._file.write(line(self.key, index, fields))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """On disk when it returns."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def line(key: str, index: int, fields: Fields) -> bytes:
    """A result as it is written."""
    digest = _digest(key, index, fields)
    return json.dumps([key, index, fields, digest], ensure_ascii=False).encode() + b"\n"


def _digest(*result: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(result, sort_keys=True).encode())


def _read(path: Path) -> tuple[list[tuple[str, int, Fields]], int]:
    """The results (key, index, fields) in a file, and how many of its lines are damaged.

    A last line that a kill has cut does not count.
    """
    with path.open("rb") as file:
        lines = list(file)
    found = [result for each in lines if (result := _read_line(each)) is not None]
    cut = bool(lines) and not lines[-1].endswith(b"\n")
    return found, len(lines) - len(found) - cut


def _read_line(text: bytes) -> tuple[str, int, Fields] | None:
    """The result that a line holds; None where it is cut or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        key, index, fields, digest = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return (key, index, fields) if digest == _digest(key, index, fields) else None
