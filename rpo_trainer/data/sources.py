"""Reading raw rows: local files, saved `datasets`, the hub, built-in tasks.

A file is either read whole and sound or refused with the place of the fault: half a file trains
half a model, and nobody notices.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import SourceSpec

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
MAX_LINE_BYTES = 64 * 2**20
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"


@dataclass
class RawSource:
    """Raw rows with their places: line numbers (from 1) for JSON lines, else indices (from 0)."""

    name: str
    rows: list[dict[str, Any]]
    places: list[int]
    where: str


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
    if local.is_dir():
        return _indexed(local.name, _read_saved(local, spec.split), str(local))
    if local.exists():
        return _load_file(local, spec.split)
    if _may_be_hub_name(spec.path):
        return _indexed(spec.path, _read_hub(spec.path, spec.split), spec.path)
    raise DataError(
        "no such file", where=str(local), fix="give a path relative to the recipe, or a hub name"
    )


def _indexed(name: str, rows: list[dict[str, Any]], where: str) -> RawSource:
    if not rows:
        raise DataError("the data set has no rows", where=where)
    return RawSource(name, rows, list(range(len(rows))), where)


def _load_task(spec: SourceSpec, seed: int) -> RawSource:
    from rpo_trainer import quickstart  # imported here: it needs this package in turn

    assert spec.task is not None
    if spec.size is None:
        raise DataError("a task needs `size`, its number of rows", where=f"task {spec.task}")
    own_seed = seed if spec.seed is None else spec.seed
    rows = quickstart.load_task(spec.task, spec.split or "train", spec.size, own_seed)
    return _indexed(spec.task, list(rows), f"task {spec.task}")


# ---------------------------------------------------------------- local files


def _load_file(path: Path, split: str | None) -> RawSource:
    kind = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None)
    where = str(path)
    if kind is None:
        raise DataError(
            f"unknown kind of file {path.suffix!r}",
            where=where,
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    if split is not None:
        raise DataError(
            "a file has no splits", where=where, fix="remove `split`, or give the file of the split"
        )
    try:
        with path.open("rb") as file:
            _check_magic(file, kind, where)
            if kind == ".parquet":
                return _indexed(path.name, _read_parquet(path), where)
            if kind == ".json":
                return _indexed(path.name, _read_json(file.read(), where), where)
            lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if kind == ".jsonl.gz" else file
            rows, places = _read_lines(lines, where)
            return RawSource(path.name, rows, places, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the gzip file is cut or damaged ({error})", where=where) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", where=where) from None


def _check_magic(file: BinaryIO, kind: str, where: str) -> None:
    head = file.read(4)
    if not head:
        raise DataError("the file is empty", where=where)
    found = (
        "gzip" if head.startswith(GZIP_MAGIC) else "parquet" if head == PARQUET_MAGIC else "text"
    )
    meant = {".jsonl.gz": "gzip", ".parquet": "parquet"}.get(kind, "text")
    if found != meant:
        raise DataError(
            f"the name ends with {kind} but the content is {found}",
            where=where,
            fix="rename the file to what it is",
        )
    if kind == ".parquet":
        file.seek(-4, 2)
        if file.read() != PARQUET_MAGIC:
            raise DataError("the parquet file is cut: its end is missing", where=where)
    file.seek(0)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        return list(pyarrow.parquet.ParquetFile(path).read().to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the parquet file is damaged ({error})", where=str(path)) from None


def _read_lines(file: BinaryIO, where: str) -> tuple[list[dict[str, Any]], list[int]]:
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    offset = 0
    lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    for number, raw, last in _with_last(lines):
        here = f"{where}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=here)
        text = _decode(raw, offset, here)
        offset += len(raw)
        if text.strip():
            rows.append(_row(_parse(text, here, last=last), here))
            places.append(number)
    if not rows:
        what = "the file has only blank lines" if offset else "the file is empty"
        raise DataError(what, where=where)
    return rows, places


def _with_last(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line, whether it is the last), one line read ahead."""
    waiting: bytes | None = None
    number = 0
    for line in lines:
        if waiting is not None:
            yield number, waiting, False
        waiting = line
        number += 1
    if waiting is not None:
        yield number, waiting, True


def _read_json(data: bytes, where: str) -> list[dict[str, Any]]:
    text = _decode(data, 0, where)
    if not text.strip():
        raise DataError("the file has only blank lines", where=where)
    if text.lstrip().startswith("{"):
        raise DataError(
            "the file is an object, not a list of objects",
            where=where,
            fix="rename it to .jsonl if every line is an object, else wrap the rows in [ ]",
        )
    value = _parse(text, where, last=True)
    if not isinstance(value, list):
        raise DataError(f"the file holds {_json_type(value)}, not a list of objects", where=where)
    return [_row(item, f"{where}, item {index}") for index, item in enumerate(value)]


def _row(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"the row is {_json_type(value)}, not an object", where=where)
    return value


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a bool", type(None): "null"}
    return names.get(type(value), "a number")


# ---------------------------------------------------------------- strict JSON


def _decode(raw: bytes, offset: int, where: str) -> str:
    if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
        raw, offset = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}",
            where=where,
            fix="convert the file to UTF-8",
        ) from None


def _parse(text: str, where: str, *, last: bool) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut = last and not text.rstrip().endswith(("}", "]"))
        what = "the last line is cut" if cut else "not valid JSON"
        line = f"{where}:{error.lineno}" if error.lineno > 1 else where
        raise DataError(f"{what} ({error.msg}, column {error.colno})", where=line) from None
    except _StrictError as error:
        raise DataError(str(error), where=where) from None
    except RecursionError:
        raise DataError("nested too deeply", where=where) from None
    # Only an escape can bring half a surrogate pair through the UTF-8 decoder.
    if "\\ud" in text or "\\uD" in text:
        _no_half_surrogates(value, where)
    return value


class _StrictError(ValueError):
    """Valid for Python's JSON reader, not for us."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _StrictError(f"the key {twice!r} is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _StrictError(f"{name} is not JSON; a missing number is null")


def _no_half_surrogates(value: Any, where: str) -> None:
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise DataError(
                "a text holds half of a surrogate pair (\\ud800 to \\udfff)",
                where=where,
                why="it is no character, and no tokenizer takes it",
                fix="write the pair whole, or the character itself",
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_half_surrogates(key, where)
            _no_half_surrogates(item, where)
    elif isinstance(value, list):
        for item in value:
            _no_half_surrogates(item, where)


# ---------------------------------------------------------------- `datasets`


def _read_saved(path: Path, split: str | None) -> list[dict[str, Any]]:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            "is a directory, and not a data set saved with `save_to_disk`",
            where=str(path),
            fix=f"give a file ({', '.join(SUFFIXES)}) or save the data set there",
        )
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"the saved data set is damaged ({error})", where=str(path)) from None
    return _rows_of(data, split, str(path))


def _rows_of(data: Any, split: str | None, where: str) -> list[dict[str, Any]]:
    if isinstance(data, dict):
        wanted = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if wanted not in data:
            raise DataError(
                f"no split {wanted!r}", where=where, fix=f"split: {' | '.join(map(str, data))}"
            )
        data = data[wanted]
    elif split is not None:
        raise DataError("the saved data set has no splits", where=where, fix="remove `split`")
    return list(data.to_list())


def _may_be_hub_name(path: str) -> bool:
    named_file = any(path.endswith(suffix) for suffix in (*SUFFIXES, ".gz", ".csv", ".txt"))
    return not named_file and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path, re.ASCII) is not None


def _read_hub(name: str, split: str | None) -> list[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no file of this name, and the hub gives no data set of this name ({first})",
            where=name,
            fix="check the path (relative to the recipe), the hub name, or the network",
        ) from None
    # With `split` the hub gives that split alone, so there is nothing left to choose.
    return _rows_of(data, split if isinstance(data, dict) else None, name)
