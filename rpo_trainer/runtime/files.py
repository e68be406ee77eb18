"""Atomic file writes, digests, and file system errors."""

from __future__ import annotations

import difflib
import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from rpo_trainer.runtime.cores import usable_cores

_REFUSALS = (
    errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EACCES, errno.EPERM,
    errno.EROFS, errno.EIO,
)  # fmt: skip
TRUNCATED = "a file could not be written to its end"
# Of torch, which writes archives through C++ streams.
_NOT_WRITTEN = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
DIGEST_SUFFIX = ".xxh3_128"
# A file changed this shortly before it was read may change again with the same timestamp.
_TIME_STEP_NS = 2 * 10**9
_BLOCK = 2**22  # bytes read at once
# Digests of the files that this process has read, by `stat` of `known_digest`.
_digests: dict[tuple[int, ...], str] = {}
_LEAST_THREADS, _MOST_THREADS = 4, 16  # more than cores: some of them wait for the disk

S = TypeVar("S")
T = TypeVar("T")


def near_directory(path: Path) -> str:
    """Return "; did you mean `x`?" for a directory with a similar name next to `path`, or ""."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f"; did you mean `{near[0]}`?" if near else ""


def atomic_write(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its pieces, atomically; it is on disk when this returns."""
    os.replace(_staged(path, text), path)


def _staged(path: Path, text: str | Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    staged.unlink(missing_ok=True)  # of a process that was killed
    with staged.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    return staged


def write_with_digest(path: Path, text: str | Iterable[str]) -> None:
    """Write a file with `atomic_write`, and the digest of its content next to it (`digest_path`).

    The digest is written first, so a file without one is incomplete.
    """
    staged = _staged(path, text)
    atomic_write(digest_path(path), file_digest(staged) + "\n")
    os.replace(staged, path)


def digest_path(path: Path) -> Path:
    """Return the path of the digest of a file of `write_with_digest`."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def verify_digest(path: Path) -> str | None:
    """Describe what is wrong with a file of `write_with_digest`; None if it is unchanged."""
    digest_file = digest_path(path)
    try:
        expected = digest_file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"{digest_file.name} cannot be read: {error.strerror or error}"
    try:
        return None if file_digest(path) == expected else "its content has changed"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def read_text(path: Path, limit: int) -> str:
    """Read a UTF-8 text file without its byte-order mark.

    Raises:
        OSError: it is unreadable, or a pipe, a device or the like (see `kind_of_file`).
        ValueError: not UTF-8, or more than `limit` bytes.
    """
    if (kind := kind_of_file(path)) is not None:
        raise OSError(f"this is {kind}, not a file")
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return raw.decode("utf-8-sig")


def make_folder(folder: Path) -> list[Path]:
    """Create a directory and its parents, and return the new ones, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove directories in order until one is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file's content."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return str(digest.hexdigest())


def in_threads(read: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return the results of a function that reads files, in the order of `items`, with several threads.

    Reading and hashing release the interpreter lock. The first error is raised.
    """
    threads = min(_MOST_THREADS, max(_LEAST_THREADS, usable_cores()), len(items))
    if threads <= 1:
        return [read(item) for item in items]
    with ThreadPoolExecutor(threads) as readers:
        return list(readers.map(read, items))


def json_digest(content: Mapping[str, Any]) -> str:
    """Return the xxh3-128 of JSON content, independent of key order."""
    plain = json.loads(json.dumps(content))  # as it will be read: keys are text
    return str(xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode()))


def tree_digest(folder: Path, digest_of: Callable[[Path], str]) -> str:
    """Return the xxh3-128 of the names and digests of all files below a directory."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{digest_of(path)}\n".encode())
    return str(digest.hexdigest())


def known_digest(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the digest of a file as `digest`, and its size, inode and times as `stat`.

    `known`, an earlier result, is returned if `stat` is the same. Programs can set the modification time but
    not the change time (ctime), so replaced content is detected. Otherwise the file is read, once per
    process.
    """
    status = path.stat()
    now = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if known is not None and known.get("stat") == now:
        return dict(known)
    if (digest := _digests.get(tuple(now))) is not None:
        return {"digest": digest, "stat": now}
    digest, settled = settled_digest(path, status.st_ctime_ns)
    if not settled:
        return {"digest": digest}
    _digests[tuple(now)] = digest
    return {"digest": digest, "stat": now}


def settled_digest(path: Path, time_ns: int) -> tuple[str, bool]:
    """Return the digest of a file, and whether any later change gives it another time than `time_ns`.

    Args:
        time_ns: its modification or change time before it is read.
    """
    started = time.time_ns()
    return file_digest(path), started - time_ns > _TIME_STEP_NS


def settle(path: Path) -> int | None:
    """Set the modification time of a file just written back, so that any later change gives it another one.

    Returns:
        The time that the file system has kept, in ns; None if it does not set times.
    """
    try:
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 2 * _TIME_STEP_NS))
        return path.stat().st_mtime_ns
    except OSError:
        return None


def refusal(error: BaseException) -> str | None:
    """Return the file system's message if it has refused to read or write; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:  # an error on close hides the error on write
        number = seen.errno if isinstance(seen, OSError) else None
        named = isinstance(seen, OSError) and seen.filename is not None
        if number is not None and (number in _REFUSALS or named):
            return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    # safetensors and torch pass the system's message on as text only, or not at all.
    text = str(error)
    message = next((words for words in map(os.strerror, _REFUSALS) if words in text), None)
    if message is None and isinstance(error, RuntimeError) and any(w in text for w in _NOT_WRITTEN):
        message = TRUNCATED
    return message


def kind_of_file(path: Path) -> str | None:
    """Return the kind of a path that is neither file nor directory, such as `a pipe`; else None.

    Opening a pipe waits for a writer, and a device may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    kinds = {
        stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode))
