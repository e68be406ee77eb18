"""Reading raw rows: local files, saved `datasets`, the hub, built-in tasks.

A file is either read whole and sound or refused with the place of the fault: nothing of a damaged file
is trained on.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rpo_trainer.data.csv_file import read_csv
from rpo_trainer.data.json_file import (
    AGAIN,
    GIVE_ROWS,
    NO_ROWS,
    NOT_WHOLE,
    read_json,
    read_lines,
)
from rpo_trainer.data.tasks import load_task
from rpo_trainer.errors import DataError, first_line
from rpo_trainer.runtime.file_errors import UNREADABLE
from rpo_trainer.runtime.files import kind_of_file

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import SourceSpec

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv")
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
BY_NAME = "how a file is read follows from its name"


@dataclass
class RawSource:
    """Raw rows with their places: line numbers (from 1) for JSON lines, else indices (from 0).

    `arrow`: they come out of a table, where every object of a column has all of its keys.
    `untyped`: every value is text (CSV).
    """

    name: str
    rows: list[dict[str, Any]]
    places: list[int]
    where: str
    arrow: bool = False
    untyped: bool = False


def load_source(spec: SourceSpec, base_dir: Path | None, seed: int) -> RawSource:
    """All rows of one source of a recipe.

    Args:
        spec: `path` (a file, a saved dataset, or a hub name) or `task`.
        base_dir: relative paths start here (None: the working directory).
        seed: of the recipe or stage; a task's own `seed` goes before it.

    Raises:
        DataError: the source is absent, empty, damaged, or not what its name says.
    """
    if spec.task is not None:
        return _load_task(spec, seed)
    assert spec.path is not None
    local = (base_dir or Path()) / Path(spec.path).expanduser()
    if os.path.isdir(local):  # unlike the method of Path, it takes every text for a name
        return _indexed(local.name, _read_saved(local, spec.split), str(local), arrow=True)
    _require_file(local)
    if os.path.exists(local):
        return _load_file(local, spec.split)
    if _may_be_hub_name(spec.path):
        return _indexed(spec.path, _read_hub(spec.path, spec.split), spec.path, arrow=True)
    near = _near(local)
    raise DataError(
        f"no such file; did you mean `{near}`?" if near else "no such file",
        code="data.no-such-file",
        where=str(local),
        why=NO_ROWS,
        fix="give a path relative to "
        + ("the working directory" if base_dir is None else "the recipe's folder (overrides too)")
        + ", or a hub name",
    )


def _require_file(path: Path) -> None:
    """Raises DataError for pipes, devices and the like."""
    if (kind := kind_of_file(path)) is not None:
        raise DataError(
            f"this is {kind}, not a file",
            code="data.not-a-file",
            where=str(path),
            why="the rows are read more than once, and reading from it may block forever",
            fix="write the rows to a file, and give that",
        )


def _near(path: Path) -> str | None:
    """The file of the same directory with the nearest name."""
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(SUFFIXES)]
    except (OSError, ValueError):
        return None
    # By their stems: a shared suffix does not make two names similar.
    stems = {name.split(".")[0]: name for name in names}
    near = difflib.get_close_matches(path.name.split(".")[0], stems, n=1, cutoff=0.75)
    return stems[near[0]] if near else None


def _indexed(
    name: str, rows: list[dict[str, Any]], where: str, *, arrow: bool = False
) -> RawSource:
    if not rows:
        raise DataError(
            "the data set has no rows",
            code="data.no-rows",
            where=where,
            why=NO_ROWS,
            fix="give one with rows",
        )
    return RawSource(name, rows, list(range(len(rows))), where, arrow)


def _load_task(spec: SourceSpec, seed: int) -> RawSource:
    assert spec.task is not None
    if spec.size is None:
        raise DataError(
            "a task needs `size`, its number of rows",
            code="data.missing-size",
            where=f"task {spec.task}",
            why="its rows are made on the spot, as many as are asked for",
            fix="add for example `size: 1000`",
        )
    own_seed = seed if spec.seed is None else spec.seed
    rows = load_task(spec.task, spec.split or "train", spec.size, own_seed)
    return _indexed(spec.task, list(rows), f"task {spec.task}")


# ---------------------------------------------------------------- local files


def _load_file(path: Path, split: str | None) -> RawSource:
    kind = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None)
    where = str(path)
    if kind is None:
        raise DataError(
            f"unknown kind of file {path.suffix!r}",
            code="data.unknown-suffix",
            where=where,
            why=BY_NAME,
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    if split is not None:
        raise DataError(
            "a file has no splits",
            code="data.no-splits",
            where=where,
            why="all of its rows would be taken for those of one split",
            fix="remove `split`, or give the file of the split",
        )
    try:
        with path.open("rb") as file:
            _check_magic(file, kind, where)
            if kind == ".parquet":
                return _indexed(path.name, _read_parquet(path), where, arrow=True)
            if kind == ".csv":
                return replace(_indexed(path.name, read_csv(path), where), untyped=True)
            if kind == ".json":
                return _indexed(path.name, read_json(file.read(), where), where)
            lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if kind == ".jsonl.gz" else file
            rows, places = read_lines(lines, where)
            return RawSource(path.name, rows, places, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the gzip file is cut or damaged ({error})"
        raise DataError(
            what, code="data.damaged-file", where=where, why=NOT_WHOLE, fix=AGAIN
        ) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        fix = "give its reader the right to read it"
        raise DataError(
            what, code="data.unreadable-file", where=where, why=NO_ROWS, fix=fix
        ) from None


def _check_magic(file: BinaryIO, kind: str, where: str) -> None:
    head = file.read(4)
    if not head:
        raise DataError(
            "the file is empty", code="data.no-rows", where=where, why=NO_ROWS, fix=GIVE_ROWS
        )
    found = (
        "gzip" if head.startswith(GZIP_MAGIC) else "parquet" if head == PARQUET_MAGIC else "text"
    )
    meant = {".jsonl.gz": "gzip", ".parquet": "parquet"}.get(kind, "text")
    if found != meant:
        raise DataError(
            f"the name ends with {kind} but the content is {found}",
            code="data.wrong-suffix",
            where=where,
            why=BY_NAME,
            fix="rename the file to what it is",
        )
    if kind == ".parquet":
        file.seek(-4, 2)
        if file.read() != PARQUET_MAGIC:
            what = "the parquet file is cut: its end is missing"
            raise DataError(what, code="data.damaged-file", where=where, why=NOT_WHOLE, fix=AGAIN)
    file.seek(0)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        what = f"the parquet file is damaged ({first_line(error)})"
        raise DataError(
            what, code="data.damaged-file", where=str(path), why=NOT_WHOLE, fix=AGAIN
        ) from None
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"the column {twice!r} is there twice",
            code="data.duplicate-column",
            where=str(path),
            why="only the last would be read",
            fix="write the file again with one of them",
        )
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f"the column {name!r} holds invalid text ({first_line(error)})",
                code="data.not-utf8",
                where=str(path),
                why="tokenizers need valid UTF-8",
                fix="write the file again, with its texts in UTF-8",
            ) from None
    return list(table.to_pylist())


# ---------------------------------------------------------------- `datasets`


def _read_saved(path: Path, split: str | None) -> list[dict[str, Any]]:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            "this is a directory, and not a data set saved with `save_to_disk`",
            code="data.not-a-data-set",
            where=str(path),
            why="which of its files hold the rows cannot be guessed",
            fix=f"give a file ({', '.join(SUFFIXES)}) or save the data set there",
        )
    import datasets

    for file in path.rglob("*"):
        _require_file(file)
    _check_shards(path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        what = f"the saved data set is damaged ({first_line(error)})"
        fix = "save the data set again"
        raise DataError(
            what, code="data.damaged-file", where=str(path), why=NOT_WHOLE, fix=fix
        ) from None
    return _rows_of(data, split, str(path))


def _check_shards(folder: Path) -> None:
    """Raises DataError where the Arrow files of a saved data set have different columns."""
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    for state in folder.rglob("state.json"):
        try:
            files = [state.parent / entry["filename"] for entry in _data_files(state)]
            shards = [(file, pyarrow.ipc.open_stream(file).schema) for file in files]
        except (*UNREADABLE, pyarrow.ArrowException):
            continue  # `datasets` says what is wrong with it
        for file, schema in shards[1:]:
            first, columns = shards[0]
            if set(schema.names) != set(columns.names):
                raise DataError(
                    f"the shards disagree on columns: {first.name} has "
                    f"{', '.join(columns.names)}; {file.name} has {', '.join(schema.names)}",
                    code="data.different-shards",
                    where=str(state.parent),
                    why="a part of the rows would lack what the others have",
                    fix="save the data set again, with the same columns in every shard",
                )


def _data_files(state: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return found


def _rows_of(data: Any, split: str | None, where: str) -> list[dict[str, Any]]:
    if isinstance(data, dict):
        wanted = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if wanted not in data:
            raise DataError(
                f"no split {wanted!r}",
                code="data.unknown-split",
                where=where,
                why="which of the others is meant cannot be guessed",
                fix=f"split: {' | '.join(map(str, data))}",
            )
        data = data[wanted]
    elif split is not None:
        raise DataError(
            "the saved data set has no splits",
            code="data.no-splits",
            where=where,
            why="all of its rows would be taken for those of one split",
            fix="remove `split`",
        )
    return list(data.to_list())


def _may_be_hub_name(path: str) -> bool:
    named_file = any(path.endswith(suffix) for suffix in (*SUFFIXES, ".gz", ".txt", ".tsv"))
    return not named_file and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path, re.ASCII) is not None


def _read_hub(name: str, split: str | None) -> list[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            "no file of this name, and the hub gives no data set of this name "
            f"({first_line(error)})",
            code="data.no-such-data-set",
            where=name,
            why=NO_ROWS,
            fix="check the path (relative to the recipe), the hub name, or the network",
        ) from None
    # With `split` the hub gives that split alone, so there is nothing left to choose.
    return _rows_of(data, split if isinstance(data, dict) else None, name)
