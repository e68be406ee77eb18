"""Read JSON files: one object per line, or one list of objects.

Repeated keys, NaN, truncated lines and wrong encodings are errors with their location.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

from rpo_trainer.errors import DataError
from rpo_trainer.runtime.row_progress import RowProgress

MAX_LINE_BYTES = 64 * 2**20
GIVE_ROWS = "use a file with at least one row"
LISTED = "a .json file contains one list of rows"
AGAIN = "write or copy the file again"


def read_lines(
    file: BinaryIO, where: str, limit: int | None = None, *, progress: RowProgress | None = None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the rows of a file with one object per line, and their line numbers.

    Args:
        limit: read the first rows only, at most this many; None: all.
        progress: shows the number of rows read.

    Raises:
        DataError: the rows that are read are not valid, or there are none.
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
                why="the file probably has no line breaks",
                fix="write one row per line, or rename a file that is one JSON list to .json",
            )
        text = decode(raw, offset, here)
        offset += len(raw)
        if text.strip():
            rows.append(_row(parse(text.rstrip("\r\n"), here, last=last), here))
            places.append(number)
            if progress is not None:
                progress.advance()
            if len(rows) == limit:
                break
    if not rows:
        what = "the file has only blank lines" if offset else "the file is empty"
        raise DataError(what, code="data.no-rows", where=where, fix=GIVE_ROWS)
    return rows, places


def _with_last(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (line number, line, whether it is the last), reading one line ahead."""
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
    """Read the rows of a file that is a list of objects. Raises DataError."""
    text = decode(data, 0, where)
    if not text.strip():
        raise DataError(
            "the file has only blank lines",
            code="data.no-rows",
            where=where,
            fix=GIVE_ROWS,
        )
    if text.lstrip().startswith("{"):
        raise DataError(
            "the file contains an object, not a list of objects",
            code="data.not-a-list",
            where=where,
            why=LISTED,
            fix="rename it to .jsonl if every line is an object, otherwise enclose the rows in [ ]",
        )
    value = parse(text, where, last=True)
    if not isinstance(value, list):
        what = f"the file contains {_json_type(value)}, not a list of objects"
        raise DataError(
            what, code="data.not-a-list", where=where, why=LISTED, fix="enclose the rows in [ ]"
        )
    return [_row(item, f"{where}, item {index}") for index, item in enumerate(value)]


def _row(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"the row is {_json_type(value)}, not an object",
            code="data.row-not-object",
            where=where,
            fix='write rows as objects: {"prompt": ..., "response": ...}',
        )
    return value


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a bool", type(None): "null"}
    return names.get(type(value), "a number")


def decode(raw: bytes, offset: int, where: str) -> str:
    """Decode bytes at `offset` of a file as UTF-8, without the byte-order mark at its beginning.

    Raises DataError: not UTF-8, with the offset of the first invalid byte.
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
            fix="convert the file to UTF-8",
        ) from None


def parse(text: str, where: str, *, last: bool) -> Any:
    """Parse JSON strictly.

    Args:
        last: `text` is the end of the file, so that incomplete JSON means a truncated file.

    Raises:
        DataError: not JSON, NaN or Infinity, a repeated key, a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        truncated = last and not text.rstrip().endswith(("}", "]"))
        line = f"{where}:{error.lineno}" if error.lineno > 1 else where
        detail = f"({error.msg}, column {error.colno})"
        if truncated:
            raise DataError(
                f"the last line is truncated {detail}",
                code="data.damaged-file",
                where=line,
                fix=AGAIN,
            ) from None
        raise DataError(
            f"not valid JSON {detail}",
            code="data.invalid-json",
            where=line,
            fix="fix the line; each line must be one JSON object",
        ) from None
    except DataError as error:  # raised by the hooks, which have no location
        raise error.at(where) from None
    except ValueError:  # valid JSON that Python refuses
        raise DataError(
            "the row contains an integer with thousands of digits",
            code="data.huge-number",
            where=where,
            fix="write it as text",
        ) from None
    except RecursionError:
        raise DataError(
            "the JSON is nested too deeply",
            code="data.nested-too-deeply",
            where=where,
            why="JSON readers limit the depth",
            fix="reduce the depth of the row",
        ) from None
    # Only an escape sequence can carry a lone surrogate through the UTF-8 decoder.
    if "\\ud" in text or "\\uD" in text:
        _no_lone_surrogates(value, where)
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"the key {twice!r} occurs twice in one object",
            code="data.duplicate-key",
            fix="remove one of them",
        )
    return found


def _no_constant(name: str) -> NoReturn:
    raise DataError(
        f"{name} is not a JSON number",
        code="data.not-finite",
        fix="write null for a missing number",
    )


def _no_lone_surrogates(value: Any, where: str) -> None:
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise DataError(
                "a text contains a lone surrogate (\\ud800 to \\udfff)",
                code="data.lone-surrogate",
                where=where,
                why="it is not a valid character, and tokenizers reject it",
                fix="write both surrogates, or the character itself",
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_lone_surrogates(key, where)
            _no_lone_surrogates(item, where)
    elif isinstance(value, list):
        for item in value:
            _no_lone_surrogates(item, where)
