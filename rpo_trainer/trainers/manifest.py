"""Manifests: sizes, times and hashes of the files of a checkpoint or an output.

All ranks share the hashing: each hashes the files that it has written, and files that only one rank writes
are divided among all. A file whose size and modification time are those of the manifest is not read again.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rpo_trainer.runtime.files import atomic_write, file_digest, in_threads, settle, settled_digest
from rpo_trainer.runtime.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Files with the number of the rank that writes them: of transformers, of FSDP2, of DeepSpeed.
_OF_RANK = re.compile(
    r"(?:^|/)(?:rng_state_(\d+)\.pth|__(\d+)_\d+\.distcp|(?:\w+_)?zero_pp_rank_(\d+)_\w+\.pt)$"
)


@dataclass(frozen=True)
class Entry:
    """A file of a manifest.

    Attributes:
        size: in bytes.
        xxh3_128: digest of its content.
        mtime_ns: its modification time, if any later change gives it another one; otherwise None.
    """

    size: int
    xxh3_128: str
    mtime_ns: int | None = None


def write_manifest(folder: Path, ranks: Ranks = ALONE) -> None:
    """Write sizes, times and hashes of all files of a directory to its `manifest.json`, synced to disk.

    Args:
        ranks: the processes that hash; all of them call this when the last one has written its files. Files
            that a process does not see are hashed by the main process.
    """
    sizes = ranks.on_main(lambda: _sizes(folder))
    own = shares(sizes, ranks.world_size())[ranks.rank()]
    found = in_threads(lambda path: _seen(path, folder, sizes), [folder / name for name in own])
    seen = {name: entry for name, entry in zip(own, found, strict=True) if entry is not None}
    entries = ranks.all_gather_dict(seen)

    def write() -> None:
        unseen = [name for name in sizes if name not in entries]
        _write(folder, {**entries, **_entries(folder, unseen)})

    ranks.on_main(write)


def add_to_manifest(folder: Path, name: str) -> None:
    """Add a file to the manifest of its directory, or update its entry if its content has changed."""
    entries, path = _read(folder), folder / name
    before = entries.get(name)
    if before is None or before.xxh3_128 != file_digest(path):
        _write(folder, entries | _entries(folder, [name]))


def digests_in(folder: Path) -> dict[str, str]:
    """Return the digests in the manifest of a directory, by file name."""
    return {name: entry.xxh3_128 for name, entry in sorted(_read(folder).items())}


def verify_manifest(folder: Path, *, content: bool = False) -> str | None:
    """Return the difference between a directory and its manifest, or None if there is none.

    A file is read if its modification time is another one, as in a copied directory, or is not recorded. If
    the content is the same, the new time is recorded.

    Args:
        content: read every file. This also finds a change that keeps size and modification time.
    """
    if not (folder / MANIFEST).is_file():
        return f"no {MANIFEST}: it was not written completely"
    try:
        entries = _read(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    times: dict[str, int] = {}
    for name, entry in entries.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            status = path.stat()
        except OSError as error:
            return _unreadable(name, error)
        if status.st_size != entry.size:
            return f"{name} has {status.st_size} bytes, {entry.size} were written"
        times[name] = status.st_mtime_ns
    read = [name for name in times if content or times[name] != entries[name].mtime_ns]
    if not read:
        return None
    moved = [name for name in read if entries[name].mtime_ns not in (None, times[name])]
    if content or moved:
        logger.info(
            "%s: reading %d files (%.1f GiB) to verify them%s", folder, len(read),
            sum(entries[name].size for name in read) / 2**30,
            "" if content else ", because their modification times have changed",
        )  # fmt: skip
    return _read_again(folder, entries, {name: times[name] for name in read})


def shares(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Return the files that each rank hashes: those that it has written, and an equal part of the others.

    Args:
        sizes: the size of each file in bytes, by name; the writing rank is part of some names.
    """
    loads = [0] * ranks
    parts: list[list[str]] = [[] for _ in range(ranks)]
    writers = {name: _writer(name, ranks) for name in sizes}
    # Files of unknown writers last, the largest first, each to the rank with the least work.
    for name in sorted(sizes, key=lambda name: (writers[name] is None, -sizes[name], name)):
        rank = writers[name]
        rank = min(range(ranks), key=loads.__getitem__) if rank is None else rank
        loads[rank] += sizes[name]
        parts[rank].append(name)
    return parts


def _writer(name: str, ranks: int) -> int | None:
    found = _OF_RANK.search(name)
    number = None if found is None else int(next(group for group in found.groups() if group))
    return number if number is not None and number < ranks else None


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _seen(path: Path, folder: Path, sizes: Mapping[str, int]) -> Entry | None:
    """Return the entry of a file; None if this process does not see all of it.

    A network file system may show a file of another host late.
    """
    try:
        entry = _entry(path)
    except OSError:
        return None
    return entry if entry.size == sizes[path.relative_to(folder).as_posix()] else None


def _entries(folder: Path, names: Sequence[str]) -> dict[str, Entry]:
    found = in_threads(_entry, [folder / name for name in names])
    return dict(zip(names, found, strict=True))


def _entry(path: Path) -> Entry:
    time = settle(path)
    return Entry(path.stat().st_size, file_digest(path), time)


def _read_again(folder: Path, entries: dict[str, Entry], times: Mapping[str, int]) -> str | None:
    """Compare the content of files with the manifest, and record their times."""

    def compare(path: Path) -> tuple[str | None, bool]:
        name = path.relative_to(folder).as_posix()
        try:
            digest, settled = settled_digest(path, times[name])
        except OSError as error:
            return _unreadable(name, error), False
        same = digest == entries[name].xxh3_128
        return None if same else f"the content of {name} has changed", settled

    by_size = sorted(times, key=lambda name: -entries[name].size)
    found = dict(zip(by_size, in_threads(compare, [folder / n for n in by_size]), strict=True))
    for name in times:
        if (fault := found[name][0]) is not None:
            return fault
    now = {
        name: replace(entry, mtime_ns=times[name]) if found.get(name, (None, False))[1] else entry
        for name, entry in entries.items()
    }
    if now != entries:
        try:
            _write(folder, now)
        except OSError as error:
            logger.info(
                "%s: the new modification times cannot be recorded (%s): the next start reads these files "
                "again", folder, error.strerror or error,
            )  # fmt: skip
    return None


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read ({error.strerror or error})"


def _read(folder: Path) -> dict[str, Entry]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {str(name): _parsed(entry) for name, entry in files.items()}


def _parsed(entry: Mapping[str, Any]) -> Entry:
    time = entry.get("mtime_ns")  # not in manifests of early versions
    return Entry(int(entry["size"]), str(entry["xxh3_128"]), None if time is None else int(time))


def _write(folder: Path, entries: Mapping[str, Entry]) -> None:
    files = {
        name: {field: value for field, value in asdict(entry).items() if value is not None}
        for name, entry in sorted(entries.items())
    }
    atomic_write(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1))
