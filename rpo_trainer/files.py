"""Files written whole or not at all, and what tells their content."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import xxhash


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its pieces, whole or not at all; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return str(digest.hexdigest())


def tree_digest(folder: Path) -> str:
    """xxh3-128 of the names and contents of all files below a directory."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return str(digest.hexdigest())
