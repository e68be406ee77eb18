"""Tokenized examples in a directory: shards of a fixed number of rows, each complete or absent.

`shard-00000.arrow` has the examples as an Arrow stream, uncompressed, to be memory-mapped. After it,
`shard-00000.json` is written, with its size and digest, the counts of the audit, and the faults of rows, and
after all shards `tokenized.json`, with their number.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.audit_json import audit_from_json, audit_to_json
from rpo_trainer.data.rows import Row, RowError, RowProblems
from rpo_trainer.data.tokenize_batch import BatchTokenizer, schema
from rpo_trainer.errors import DataError
from rpo_trainer.runtime.files import atomic_write, file_digest, refusal

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

COMPLETE = "tokenized.json"
_ONE_BATCH = 2**31  # bytes; offsets in Arrow lists are int32


@dataclass
class Shard:
    """A written shard.

    Attributes:
        rows: number of rows, of which `examples` were kept.
        shown: its rows have been counted by `ShardWriter.advance`.
    """

    number: int
    rows: int
    examples: int
    size: int
    digest: str
    audit: Audit
    problems: RowProblems
    shown: bool = False


class ShardWriter:
    """Tokenizes and writes shards; shards are independent.

    Args:
        batch: number of rows to tokenize at once.
        advance: called with the number of rows done; not in other processes.
    """

    def __init__(
        self,
        work: BatchTokenizer,
        folder: Path,
        batch: int,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self.work = work
        self.folder = folder
        self.batch = batch
        self.advance = advance

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "advance": None}

    def __call__(self, given: tuple[int, list[Row]]) -> Shard:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        number, rows = given
        count, audit, problems = len(rows), Audit(), RowProblems()
        tables = [schema(self.work.kind).empty_table()]
        for start in range(0, count, self.batch):
            done = self.work(rows[start : start + self.batch])
            tables.append(done.table)
            audit.add_tokenized(done.audit)
            problems.add_all(done.problems)
            if self.advance is not None:
                self.advance(done.rows)
        table = pa.concat_tables(tables)
        if table.nbytes < _ONE_BATCH:
            table = table.combine_chunks()
        size, digest = self._write(number, table)
        shard = Shard(
            number, count, table.num_rows, size, digest, audit, problems, self.advance is not None
        )
        atomic_write(_counts_path(self.folder, number), json.dumps(_to_json(shard)))
        return shard

    def _write(self, number: int, table: Any) -> tuple[int, str]:
        """Write the examples, and return the size and the digest of the file."""
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        path = _examples_path(self.folder, number)
        _counts_path(self.folder, number).unlink(missing_ok=True)
        staged = path.with_name(f".{path.name}")
        try:
            with staged.open("wb") as file:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            size, digest = staged.stat().st_size, file_digest(staged)
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        return size, digest


def read_shard(folder: Path, number: int) -> Shard | None:
    """Return the counts of a shard; None if it is absent, incomplete or damaged (with a warning)."""
    try:
        content = json.loads(_counts_path(folder, number).read_text(encoding="utf-8"))
        shard = _from_json(content)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged: %s", _counts_path(folder, number), error)
        return None
    path = _examples_path(folder, number)
    size = path.stat().st_size if path.exists() else 0
    if size != shard.size:
        logger.warning("%s is damaged: it has %d of %d bytes", path, size, shard.size)
        return None
    return shard


def complete(folder: Path, shards: int) -> None:
    """Mark the tokenized examples in a directory as complete."""
    atomic_write(folder / COMPLETE, json.dumps({"shards": shards}))


def open_tokenized(folder: Path) -> datasets.Dataset | None:
    """Map the examples that `tokenize_rows` has written into a directory.

    Returns:
        None if they are absent or incomplete, or, with a warning, if a file is damaged: `tokenize_rows` then
        writes what is missing.

    Raises:
        DataError: the files cannot be read.
    """
    with _reported(folder, "read"):
        try:
            shards = int(json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["shards"])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged: %s", folder / COMPLETE, error)
            return None
        found = []
        for number in range(shards):
            shard = read_shard(folder, number)
            if shard is None:
                return None
            found.append(shard)
        return mapped(folder, found)


def require_tokenized(folder: Path) -> datasets.Dataset:
    """Return the examples of `open_tokenized`; DataError if a file is damaged or absent."""
    if (found := open_tokenized(folder)) is None:
        raise DataError(
            "the tokenized examples are damaged",
            code="data.tokenized-files",
            where=str(folder),
            why="a file has been changed or removed since they were written",
            fix="remove the directory; the examples are then tokenized again",
        )
    return found


def mapped(folder: Path, shards: Sequence[Shard]) -> datasets.Dataset:
    """Return the examples of all shards, memory-mapped."""
    import datasets

    files = [_examples_path(folder, shard.number) for shard in shards if shard.examples]
    tables = [datasets.table.MemoryMappedTable.from_file(str(path)) for path in files]
    digests = " ".join(shard.digest for shard in shards)
    return datasets.Dataset(
        datasets.table.concat_tables(tables),
        fingerprint=xxhash.xxh3_64_hexdigest(digests.encode()),
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create a directory, and turn errors of the file system in it into a DataError."""
    with _reported(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def _reported(folder: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the tokenized examples cannot be {done}",
            code="data.tokenized-files",
            where=str(folder),
            why=refusal(error) or str(error),
            fix="free some space, or check the permissions of the directory; what is complete is kept",
        ) from error


def _examples_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.arrow"


def _counts_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.json"


def _to_json(shard: Shard) -> dict[str, Any]:
    return {
        "number": shard.number,
        "rows": shard.rows,
        "examples": shard.examples,
        "size": shard.size,
        "digest": shard.digest,
        "audit": audit_to_json(shard.audit),
        "lengths": shard.audit._lengths,
        "problems": [[*fault, ids] for fault, ids in shard.problems._rows.items()],
    }


def _from_json(content: dict[str, Any]) -> Shard:
    audit, problems = audit_from_json(content["audit"]), RowProblems()
    audit.known_lengths, audit._lengths = {}, content["lengths"]
    for reason, code, ids in content["problems"]:
        for row_id in ids:
            problems.add(RowError(reason, code), row_id)
    return Shard(
        content["number"], content["rows"], content["examples"], content["size"], content["digest"],
        audit, problems,
    )  # fmt: skip
