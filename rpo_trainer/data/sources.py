"""Read raw rows: local files, saved `datasets`, the Hugging Face Hub, built-in tasks.

A file is read completely, or refused with the location of the fault. Damaged files are never read in part,
except where only the first rows are asked for.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rpo_trainer.data.csv_file import read_csv
from rpo_trainer.data.json_file import (
    AGAIN,
    GIVE_ROWS,
    read_json,
    read_lines,
)
from rpo_trainer.data.tasks import load_task
from rpo_trainer.errors import DataError, first_line
from rpo_trainer.runtime.file_errors import UNREADABLE
from rpo_trainer.runtime.files import kind_of_file
from rpo_trainer.runtime.hub_access import hub_answers, is_hub_name, no_answer_reason
from rpo_trainer.runtime.row_progress import RowProgress

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import SourceSpec

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv")
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
_READ_AT_ONCE = 2**16  # bytes of a column of a parquet file
BY_NAME = "the suffix determines how a file is read"


@dataclass
class RawSource:
    """Raw rows with their positions: line numbers (from 1) for JSON lines, otherwise indices (from 0).

    Attributes:
        arrow: the rows are from an Arrow table, where all objects of a column have the same keys.
        untyped: all values are text (CSV).
        more: only the first rows were read, and there are others.
    """

    name: str
    rows: list[dict[str, Any]]
    places: list[int]
    where: str
    arrow: bool = False
    untyped: bool = False
    more: bool = False


@dataclass
class FirstRows:
    """Limits reading to the first rows of each source.

    Args:
        count: rows of each source, at least 1.

    Attributes:
        more: a source has rows that were not read.
    """

    count: int
    more: bool = field(init=False, default=False)


def load_source(
    spec: SourceSpec, base_dir: Path | None, seed: int, limit: int | None = None
) -> RawSource:
    """Read the rows of one source of a recipe.

    Args:
        spec: `path` (a file, a saved data set, or a hub name) or `task`.
        base_dir: base of relative paths (None: the working directory).
        seed: seed of the recipe or stage; the `seed` of a task takes precedence.
        limit: read at most the first rows, without reading the rest of a file; faults after them are not
            found. (A .json file is one value, and is read completely.) None: all rows.

    Raises:
        DataError: the source is missing, empty or damaged, or its content does not match its suffix.
    """
    if limit is None:
        return _load(spec, base_dir, seed, None)
    raw = _load(spec, base_dir, seed, limit + 1)
    more = len(raw.rows) > limit
    return replace(raw, rows=raw.rows[:limit], places=raw.places[:limit], more=more)


def _load(spec: SourceSpec, base_dir: Path | None, seed: int, limit: int | None) -> RawSource:
    """Read at least the first rows up to `limit`; see `load_source`."""
    if spec.task is not None:
        return _load_task(spec, seed)
    assert spec.path is not None
    local = (base_dir or Path()) / Path(spec.path).expanduser()
    if os.path.isdir(local):  # unlike Path.is_dir, it accepts any text
        rows = _read_saved(local, spec.split, limit)
        return _indexed(local.name, rows, str(local), arrow=True)
    _require_file(local)
    if os.path.exists(local):
        return _load_file(local, spec.split, limit)
    if may_be_hub_name(spec.path):
        rows = _read_hub(spec.path, spec.split, local, limit)
        return _indexed(spec.path, rows, spec.path, arrow=True)
    raise DataError(
        f"no such file{_or_near(local)}",
        code="data.no-such-file",
        where=str(local),
        fix="write a path relative to "
        + (
            "the working directory"
            if base_dir is None
            else "the recipe's directory (also in overrides)"
        )
        + ", or the name of a data set on the hub",
    )


def _require_file(path: Path) -> None:
    """Raise DataError for pipes, devices and other special files."""
    if (kind := kind_of_file(path)) is not None:
        raise DataError(
            f"this is {kind}, not a regular file",
            code="data.not-a-file",
            where=str(path),
            why="the rows are read more than once, and reading may block",
            fix="write the rows to a file",
        )


def _or_near(path: Path) -> str:
    """Return "; did you mean `x`?" for the file next to `path` with the most similar name, or ""."""
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(SUFFIXES)]
    except (OSError, ValueError):
        return ""
    # Compare stems: a common suffix does not make names similar.
    stems = {name.split(".")[0]: name for name in names}
    near = difflib.get_close_matches(path.name.split(".")[0], stems, n=1, cutoff=0.75)
    return f"; did you mean `{stems[near[0]]}`?" if near else ""


def _indexed(
    name: str, rows: list[dict[str, Any]], where: str, *, arrow: bool = False
) -> RawSource:
    if not rows:
        raise DataError(
            "the data set has no rows",
            code="data.no-rows",
            where=where,
            fix="use a data set with at least one row",
        )
    return RawSource(name, rows, list(range(len(rows))), where, arrow)


def _load_task(spec: SourceSpec, seed: int) -> RawSource:
    assert spec.task is not None
    if spec.size is None:
        raise DataError(
            "`size` is missing",
            code="data.missing-size",
            where=f"task {spec.task}",
            why="the rows of a task are generated",
            fix="add the number of rows, for example `size: 1000`",
        )
    own_seed = seed if spec.seed is None else spec.seed
    rows = load_task(spec.task, spec.split or "train", spec.size, own_seed)
    return _indexed(spec.task, list(rows), f"task {spec.task}")


# ---------------------------------------------------------------- local files


def _load_file(path: Path, split: str | None, limit: int | None) -> RawSource:
    kind = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None)
    where = str(path)
    if kind is None:
        raise DataError(
            f"unknown file suffix {path.suffix!r}",
            code="data.unknown-suffix",
            where=where,
            fix=f"use one of {', '.join(SUFFIXES)}",
        )
    if split is not None:
        raise DataError(
            "`split` is set, but a file has no splits",
            code="data.no-splits",
            where=where,
            fix="remove `split`, or use the file of that split",
        )
    try:
        with path.open("rb") as file:
            _check_magic(file, kind, where)
            if kind == ".parquet":
                return _indexed(path.name, _read_parquet(path, limit), where, arrow=True)
            if kind == ".csv":
                return replace(_indexed(path.name, read_csv(path, limit), where), untyped=True)
            if kind == ".json":
                return _indexed(path.name, read_json(file.read(), where), where)
            lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if kind == ".jsonl.gz" else file
            with RowProgress(None, f"reading {path.name}") as progress:
                rows, places = read_lines(lines, where, limit, progress=progress)
            return RawSource(path.name, rows, places, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the gzip file is truncated or damaged ({error})"
        raise DataError(what, code="data.damaged-file", where=where, fix=AGAIN) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        fix = "check the permissions of the file"
        raise DataError(what, code="data.unreadable-file", where=where, fix=fix) from None


def _check_magic(file: BinaryIO, kind: str, where: str) -> None:
    head = file.read(4)
    if not head:
        raise DataError("the file is empty", code="data.no-rows", where=where, fix=GIVE_ROWS)
    found = (
        "gzip" if head.startswith(GZIP_MAGIC) else "parquet" if head == PARQUET_MAGIC else "text"
    )
    meant = {".jsonl.gz": "gzip", ".parquet": "parquet"}.get(kind, "text")
    if found != meant:
        raise DataError(
            f"the suffix is {kind}, but the content is {found}",
            code="data.wrong-suffix",
            where=where,
            why=BY_NAME,
            fix="rename the file",
        )
    if kind == ".parquet":
        file.seek(-4, 2)
        if file.read() != PARQUET_MAGIC:
            what = "the parquet file is truncated"
            raise DataError(what, code="data.damaged-file", where=where, fix=AGAIN)
    file.seek(0)


def _batches(file: Any, limit: int) -> list[Any]:
    """Return the first record batches of a parquet file that have at least `limit` rows in all."""
    found: list[Any] = []
    for batch in file.iter_batches(limit):  # a batch may end with its row group
        found.append(batch)
        if sum(map(len, found)) >= limit:
            break
    return found


def _read_parquet(path: Path, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        # For the first rows, neither read all row groups ahead, nor a row group at once.
        settings = {} if limit is None else {"pre_buffer": False, "buffer_size": _READ_AT_ONCE}
        with pyarrow.parquet.ParquetFile(path, **settings) as file:
            if limit is None:
                table = file.read()
            else:
                table = pyarrow.Table.from_batches(_batches(file, limit), file.schema_arrow)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"the parquet file is damaged ({first_line(error)})"
        raise DataError(what, code="data.damaged-file", where=str(path), fix=AGAIN) from None
    twice = next((name for name in table.column_names if table.column_names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"the column name {twice!r} occurs twice",
            code="data.duplicate-column",
            where=str(path),
            fix="write the file again with unique column names",
        )
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f"the column {name!r} contains invalid text ({first_line(error)})",
                code="data.not-utf8",
                where=str(path),
                why="tokenizers require valid UTF-8",
                fix="write the file again with UTF-8 text",
            ) from None
    return list(table.to_pylist())


# ---------------------------------------------------------------- `datasets`


def _read_saved(path: Path, split: str | None, limit: int | None) -> list[dict[str, Any]]:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            "this directory is not a data set saved with `save_to_disk`",
            code="data.not-a-data-set",
            where=str(path),
            fix=f"use a file ({', '.join(SUFFIXES)}), or a directory written by `save_to_disk`",
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
        raise DataError(what, code="data.damaged-file", where=str(path), fix=fix) from None
    return _rows_of(data, split, str(path), limit)


def _check_shards(folder: Path) -> None:
    """Raise DataError if the Arrow files of a saved data set have different columns."""
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    for state in folder.rglob("state.json"):
        try:
            files = [state.parent / entry["filename"] for entry in _data_files(state)]
            shards = [(file, pyarrow.ipc.open_stream(file).schema) for file in files]
        except (*UNREADABLE, pyarrow.ArrowException):
            continue  # `datasets` reports the error
        for file, schema in shards[1:]:
            first, columns = shards[0]
            if set(schema.names) != set(columns.names):
                raise DataError(
                    f"the shards have different columns: {first.name} has "
                    f"{', '.join(columns.names)}; {file.name} has {', '.join(schema.names)}",
                    code="data.different-shards",
                    where=str(state.parent),
                    fix="save the data set again with the same columns in all shards",
                )


def _data_files(state: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return found


def _rows_of(data: Any, split: str | None, where: str, limit: int | None) -> list[dict[str, Any]]:
    if isinstance(data, dict):
        wanted = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if wanted not in data:
            raise DataError(
                f"the data set has no split {wanted!r}",
                code="data.unknown-split",
                where=where,
                fix=f"set `split` to one of: {', '.join(map(str, data))}",
            )
        data = data[wanted]
    elif split is not None:
        raise DataError(
            "`split` is set, but the saved data set has no splits",
            code="data.no-splits",
            where=where,
            fix="remove `split`",
        )
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    return list(data.to_list())


def may_be_hub_name(path: str) -> bool:
    """Whether a source that is no local path can be a data set on the hub: it is not named like a file."""
    named_file = any(path.endswith(suffix) for suffix in (*SUFFIXES, ".gz", ".txt", ".tsv"))
    return not named_file and is_hub_name(path)


def _read_hub(name: str, split: str | None, local: Path, limit: int | None) -> list[dict[str, Any]]:
    import datasets

    # Without an answer, `load_dataset` retries for 25 s before it reads its cache.
    if not hub_answers(name, "dataset") and not _is_prepared(name):
        raise DataError(
            f"neither a local file nor a data set in the cache, and {no_answer_reason()}{_or_near(local)}",
            code="data.no-such-data-set",
            where=name,
            fix="check the path (relative to the recipe); for a data set on the hub, load it once with "
            "network access, which fills the cache that is used offline",
        )
    try:
        data = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"neither a file nor a data set on the hub ({first_line(error)}){_or_near(local)}",
            code="data.no-such-data-set",
            where=name,
            fix="check the path (relative to the recipe), the hub name and the network",
        ) from None
    # With `split`, `load_dataset` returns only that split.
    return _rows_of(data, split if isinstance(data, dict) else None, name, limit)


def _is_prepared(name: str) -> bool:
    """Whether the cache of `datasets` has a data set of the hub, which can be loaded offline."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(own)])
    return any(Path(config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/*/*/*/"))
