"""Unfinished results of an output file, written row by row: `FILE.partial`.

Each line is self-contained: [key of rows and settings, index of the row, its fields, digest of these three].
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

_SYNC_SECONDS = 1.0  # results that a power failure may lose; a killed process loses none


def partial_path(path: Path, rank: int = 0) -> Path:
    """Return the path of a process's results for `path` until the file is complete."""
    return path.with_name(f"{path.name}.partial" + (f".{rank}" if rank else ""))


def partial_paths(path: Path) -> list[Path]:
    """Return the partial files of all processes; as long as one exists, the output is incomplete."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.partial*"), reverse=True)


def read_partials(path: Path, key: str, total: int) -> dict[int, Fields]:
    """Read the results for `path` by index, from all its partial files.

    Args:
        key: key of the rows and settings.
        total: number of rows; results with a larger index are ignored.

    Raises:
        RunError: a partial file has results of other rows or settings, or is not a file.
    """
    found: dict[int, Fields] = {}
    for partial in partial_paths(path):
        if not partial.is_file():
            raise RunError(
                "this path is reserved for unfinished results, and is not a file",
                code="output.partial-not-a-file",
                where=str(partial),
                fix="remove it, or choose another output file",
            )
        results, _ = _read(partial)
        if any(own != key for own, _, _ in results):
            raise RunError(
                "the file has unfinished results of other rows or settings",
                code="output.partial-mismatch",
                where=str(partial),
                fix="use the original rows and settings, remove the file, or choose another output file",
            )
        found |= {index: fields for _, index, fields in results if 0 <= index < total}
    return found


def discard_partials(path: Path, key: str) -> None:
    """Delete the unfinished work for `path` that was created from other rows or settings."""
    for partial in partial_paths(path):
        if partial.is_file() and any(own != key for own, _, _ in _read(partial)[0]):
            partial.unlink()


class PartialFile:
    """Append-only file of one process's results, created with the first result."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()

    def _open(self) -> BinaryIO:
        results, damaged = _read(self.path) if self.path.exists() else ([], 0)
        if damaged:
            logger.warning(
                "%s: %d damaged lines are ignored, and their rows are recomputed",
                self.path, damaged,
            )  # fmt: skip
        # Rewritten, not truncated at the first damaged line: the results after it may be expensive.
        staged = self.path.with_name(f".{self.path.name}")
        staged.write_bytes(b"".join(line(*result) for result in results))
        os.replace(staged, self.path)
        return self.path.open("ab")

    def write(self, index: int, fields: Fields) -> None:
        """Write one result and flush it to the operating system."""
        if self._file is None:
            self._file = self._open()
        self._file.write(line(self.key, index, fields))
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flush to disk and close."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def line(key: str, index: int, fields: Fields) -> bytes:
    """Return a result as a line of the file."""
    digest = _digest(key, index, fields)
    return json.dumps([key, index, fields, digest], ensure_ascii=False).encode() + b"\n"


def _digest(*result: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(result, sort_keys=True).encode())


def _read(path: Path) -> tuple[list[tuple[str, int, Fields]], int]:
    """Return the results (key, index, fields) in a file, and the number of damaged lines.

    An incomplete last line, from a killed process, does not count as damaged.
    """
    with path.open("rb") as file:
        lines = list(file)
    results = [result for each in lines if (result := _read_line(each)) is not None]
    incomplete = bool(lines) and not lines[-1].endswith(b"\n")
    return results, len(lines) - len(results) - incomplete


def _read_line(text: bytes) -> tuple[str, int, Fields] | None:
    """Return the result in a line; None if it is incomplete or damaged."""
    if not text.endswith(b"\n"):
        return None
    try:
        key, index, fields, digest = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return (key, index, fields) if digest == _digest(key, index, fields) else None
