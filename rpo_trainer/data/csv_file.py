"""Read CSV files. CSV has no types: digits in a prompt stay text, digits in a reward become a number."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from rpo_trainer.data.json_file import decode
from rpo_trainer.errors import DataError

INDEX = "Unnamed: 0"  # pandas' name for the unnamed column that `to_csv` writes
_OWN_NAMES = "give each column a unique name in the first line"
_PLAIN = re.compile(r"[^,\r\n]*")
_END = re.compile(r",|\r\n|\n|\r|\Z")


_FIRST_BYTES = 2**16  # read at first for a limited number of rows


def read_csv(path: Path, limit: int | None = None) -> list[dict[str, str | None]]:
    """Read the rows of a CSV file (RFC 4180) whose first line names the columns. All values are text.

    An empty field is null, a quoted one (`""`) is an empty text. Empty lines are skipped. A first column
    without a name that holds integers is an index, and is named INDEX.

    Args:
        limit: read the first rows only, at most this many; None: all.

    Raises:
        DataError: not valid CSV, not UTF-8, or column names that are missing or repeated.
    """
    where = str(path)
    lines = iter(_first_lines(path, where, limit))
    names = [name or "" for name in next(lines, (1, []))[1]]
    rows = []
    for number, fields in lines:
        if len(fields) != len(names):
            raise _invalid(
                f"the row has {len(fields)} fields, the first line {len(names)}",
                f"{where}:{number}",
            )
        rows.append(fields)
    if names and not names[0].strip() and INDEX not in names and _is_index([r[0] for r in rows]):
        names[0] = INDEX
    _check_names(names, where)
    return [dict(zip(names, fields, strict=True)) for fields in rows]


def _first_lines(
    path: Path, where: str, limit: int | None
) -> Iterable[tuple[int, list[str | None]]]:
    """Return the lines of a file, or with `limit` the names and the first rows, from its first bytes."""
    size = _FIRST_BYTES
    while limit is not None and size < path.stat().st_size:
        with path.open("rb") as file:
            head = file.read(size)
        head = head[: head.rfind(b"\n") + 1]
        # The last row may continue beyond the bytes that were read.
        with suppress(DataError):
            first = [*islice(_lines(decode(head, 0, where), where), limit + 2)]
            if len(first) == limit + 2:
                return first[:-1]
        size *= 4
    lines = _lines(decode(path.read_bytes(), 0, where), where)
    return lines if limit is None else islice(lines, limit + 1)


def parse_numbers(rows: list[dict[str, Any]], columns: Collection[str]) -> list[dict[str, Any]]:
    """Convert the values of these columns to numbers; values that are not numbers stay text."""
    return [
        {name: _number(value) if name in columns else value for name, value in row.items()}
        for row in rows
    ]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_index(values: list[str | None]) -> bool:
    return all(value is not None and value.isascii() and value.isdigit() for value in values)


def _lines(text: str, where: str) -> Iterator[tuple[int, list[str | None]]]:
    """Yield (number of its first line, fields) for each row."""
    place, number = 0, 1
    while place < len(text):
        begin = place
        fields: list[str | None] = []
        while True:
            value: str | None
            if text.startswith('"', place):
                value, place = _quoted(text, place, where, number)
            else:
                found = _PLAIN.match(text, place)
                assert found is not None  # the pattern matches the empty text
                value, place = found[0] or None, found.end()
            fields.append(value)
            end = _END.match(text, place)
            if end is None:
                line = number + text.count("\n", begin, place)
                raise _invalid("text follows the closing quote of a field", f"{where}:{line}")
            place = end.end()
            if end[0] != ",":
                break
        if fields != [None]:
            yield number, fields
        number += text.count("\n", begin, place) or text.count("\r", begin, place)


def _quoted(text: str, place: int, where: str, number: int) -> tuple[str, int]:
    """Return the text of the quoted field that begins at `place`, and the position after it."""
    begin = end = place + 1
    while (end := text.find('"', end)) >= 0:
        if not text.startswith('"', end + 1):
            return text[begin:end].replace('""', '"'), end + 1
        end += 2
    raise _invalid("a double quote is not closed", f"{where}:{number}")


def _invalid(what: str, where: str) -> DataError:
    return DataError(
        f"not valid CSV ({what})",
        code="data.invalid-csv",
        where=where,
        fix="write as many fields in every row as there are names in the first line; enclose fields with "
        'commas, line breaks or a leading quote in double quotes, and double the quotes inside ("")',
    )


def _check_names(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"the column name {twice!r} occurs twice",
            code="data.duplicate-column",
            where=where,
            fix=_OWN_NAMES,
        )
    if any(not name.strip() for name in names):
        raise DataError(
            "a column has no name",
            code="data.unnamed-column",
            where=where,
            fix=_OWN_NAMES,
        )
