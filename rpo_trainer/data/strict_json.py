"""JSON as a data file must hold it: what other readers mend in silence is an error with its place."""

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
            where=where,
            why="read in any other way its texts would be others",
            fix="convert the file to UTF-8",
        ) from None


def parse(text: str, where: str, *, last: bool) -> Any:
    """The value that `text` says.

    Args:
        last: nothing follows it in the file, so what is not whole is cut.

    Raises:
        DataError: no JSON, NaN or Infinity, a key twice, half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut = last and not text.rstrip().endswith(("}", "]"))
        line = f"{where}:{error.lineno}" if error.lineno > 1 else where
        raise DataError(
            f"{'the last line is cut' if cut else 'not valid JSON'} "
            f"({error.msg}, column {error.colno})",
            where=line,
            why=NOT_WHOLE if cut else "no row is left out in silence",
            fix=AGAIN if cut else "mend the line; each is one JSON object",
        ) from None
    except _StrictError as error:
        what, why, fix = error.args
        raise DataError(what, where=where, why=why, fix=fix) from None
    except ValueError:  # what Python refuses although it is JSON
        what = "a whole number of thousands of digits"
        why = "no number that is used here has so many"
        raise DataError(what, where=where, why=why, fix="write it as text") from None
    except RecursionError:
        why = "no row is so deep, and no reader goes there"
        raise DataError("nested too deeply", where=where, why=why, fix="mend the line") from None
    # Only an escape can bring half a surrogate pair through the UTF-8 decoder.
    if "\\ud" in text or "\\uD" in text:
        _no_half_surrogates(value, where)
    return value


class _StrictError(ValueError):
    """Valid for Python's JSON reader, not for us: what, why, fix."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        what = f"the key {twice!r} is given twice in one object"
        raise _StrictError(what, "only the last would be read", "keep one of them")
    return found


def _no_constant(name: str) -> NoReturn:
    why = "no reward and no loss can be made of it"
    raise _StrictError(f"{name} is no number of JSON", why, "write null where there is no number")


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
