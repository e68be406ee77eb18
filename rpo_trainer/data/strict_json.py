"""JSON as a data file must hold it: what other readers repair silently is an error with its place."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from rpo_trainer.errors import DataError

NOT_WHOLE = "a part of the rows would be trained on as if it were all"
AGAIN = "write or copy the file again"


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
