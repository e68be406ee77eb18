"""Rows of JSON files: lines of objects, or one list of them.

What other readers repair silently is an error with its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

from rpo_trainer.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
GIVE_ROWS = "give a file with rows"
NO_ROWS = "without its rows there is nothing to train or measure on"
LISTED = "a file of this name holds its rows as one list"
NOT_WHOLE = "a part of the rows would be trained on as if it were all"
AGAIN = "write or copy the file again"


def read_lines(file: BinaryIO, where: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file with one object a line, and their line numbers.

    Raises DataError.
    """
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    offset = 0
    lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    for number, raw, last in _with_last(lines):
        here = f"{where}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                f"the line is longer than {MAX_LINE_BYTES} bytes",
                code="data.line-too-long",
                where=here,
                why="so long a line is more likely a file without line breaks than a row",
                fix="one row a line; a file that is one JSON list has the name .json",
            )
        text = decode(raw, offset, here)
        offset += len(raw)
        if text.strip():
            rows.append(_row(parse(text.rstrip("\r\n"), here, last=last), here))
            places.append(number)
    if not rows:
        what = "the file has only blank lines" if offset else "the file is empty"
        raise DataError(what, code="data.no-rows", where=where, why=NO_ROWS, fix=GIVE_ROWS)
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


def read_json(data: bytes, where: str) -> list[dict[str, Any]]:
    """The rows of a file that is a list of objects. Raises DataError."""
    text = decode(data, 0, where)
    if not text.strip():
        raise DataError(
            "the file has only blank lines",
            code="data.no-rows",
            where=where,
            why=NO_ROWS,
            fix=GIVE_ROWS,
        )
    if text.lstrip().startswith("{"):
        raise DataError(
            "the file is an object, not a list of objects",
            code="data.not-a-list",
            where=where,
            why=LISTED,
            fix="rename it to .jsonl if every line is an object, else wrap the rows in [ ]",
        )
    value = parse(text, where, last=True)
    if not isinstance(value, list):
        what = f"the file holds {_json_type(value)}, not a list of objects"
        raise DataError(
            what, code="data.not-a-list", where=where, why=LISTED, fix="wrap the rows in [ ]"
        )
    return [_row(item, f"{where}, item {index}") for index, item in enumerate(value)]


def _row(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"the row is {_json_type(value)}, not an object",
            code="data.row-not-object",
            where=where,
            why="without names nothing says which value is the prompt",
            fix='name the columns: {"prompt": ..., "response": ...}',
        )
    return value


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a bool", type(None): "null"}
    return names.get(type(value), "a number")


def decode(raw: bytes, offset: int, where: str) -> str:
    """Text of the bytes at `offset` of a file, without the byte-order mark at its beginning.

    Raises DataError: not UTF-8, with the place of the first wrong byte.
    """
    if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
        raw, offset = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}",
            code="data.not-utf8",
            where=where,
            why="in another encoding the texts would differ",
            fix="convert the file to UTF-8",
        ) from None


def parse(text: str, where: str, *, last: bool) -> Any:
    """The value that `text` says.

    Args:
        last: nothing follows it in the file, so what is not whole is cut.

    Raises:
        DataError: not JSON, NaN or Infinity, a key twice, a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut = last and not text.rstrip().endswith(("}", "]"))
        line = f"{where}:{error.lineno}" if error.lineno > 1 else where
        found = f"({error.msg}, column {error.colno})"
        if cut:
            raise DataError(
                f"the last line is cut {found}",
                code="data.damaged-file",
                where=line,
                why=NOT_WHOLE,
                fix=AGAIN,
            ) from None
        raise DataError(
            f"not valid JSON {found}",
            code="data.invalid-json",
            where=line,
            why="rows are never dropped silently",
            fix="fix the line; each is one JSON object",
        ) from None
    except DataError as error:  # by the hooks, which do not know the place
        raise error.at(where) from None
    except ValueError:  # what Python refuses although it is JSON
        what = "a whole number of thousands of digits"
        why = "no reward or rating needs so many"
        raise DataError(
            what, code="data.huge-number", where=where, why=why, fix="write it as text"
        ) from None
    except RecursionError:
        why = "JSON readers limit the depth, and rows do not need it"
        raise DataError(
            "nested too deeply",
            code="data.nested-too-deeply",
            where=where,
            why=why,
            fix="fix the line",
        ) from None
    # Only an escape can bring a lone surrogate through the UTF-8 decoder.
    if "\\ud" in text or "\\uD" in text:
        _no_lone_surrogates(value, where)
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"the key {twice!r} is given twice in one object",
            code="data.duplicate-key",
            why="only the last would be read",
            fix="keep one of them",
        )
    return found


def _no_constant(name: str) -> NoReturn:
    raise DataError(
        f"{name} is not a JSON number",
        code="data.not-finite",
        why="rewards and losses must be finite",
        fix="write null where there is no number",
    )


def _no_lone_surrogates(value: Any, where: str) -> None:
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise DataError(
                "a text holds a lone surrogate (\\ud800 to \\udfff)",
                code="data.lone-surrogate",
                where=where,
                why="it is not a valid character, and tokenizers refuse it",
                fix="write the pair whole, or the character itself",
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_lone_surrogates(key, where)
            _no_lone_surrogates(item, where)
    elif isinstance(value, list):
        for item in value:
            _no_lone_surrogates(item, where)
