"""Reading CSV, which has no types: digits in a prompt are text, a reward is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rpo_trainer.data.strict_json import NOT_WHOLE
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.weights import HELPSTEER_ATTRIBUTES

MAX_ROW_BYTES = 64 * 2**20
_NUMBERS = frozenset(
    {
        "chosen_reward", "rejected_reward", "score_chosen", "score_rejected", "margin", "score",
        "overall_preference", "preference_strength", *HELPSTEER_ATTRIBUTES,
    }
)  # fmt: skip


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file with a line of names. Every value is a text; an empty field is null.

    Rewards, ratings and preferences are numbers, where all filled fields of their column are.

    Raises DataError: it is not CSV, not UTF-8, or a column has no name of its own.
    """
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.csv  # type: ignore[import-untyped, unused-ignore]

    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    read = pyarrow.csv.ReadOptions(block_size=MAX_ROW_BYTES)
    if path.read_bytes().count(b'"') % 2:
        # pyarrow would read up to the end of the file as one field.
        raise DataError(
            "not valid CSV (a double quote is not closed)",
            where=str(path),
            why=NOT_WHOLE,
            fix='close it; a quote inside a field is written twice (""), and the field stands in quotes',
        )
    try:
        with pyarrow.csv.open_csv(path, read_options=read, parse_options=parse) as reader:
            names = list(reader.schema.names)
        _check_names(names, str(path))
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pyarrow.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        )
        table = pyarrow.csv.read_csv(
            path, read_options=read, parse_options=parse, convert_options=convert
        )
    except pyarrow.ArrowException as error:
        raise DataError(
            f"not valid CSV ({str(error).strip().splitlines()[0]})",
            where=str(path),
            why=NOT_WHOLE,
            fix="every row needs as many fields as the first line has names, in UTF-8; put fields with "
            "commas, quotes or line breaks in double quotes",
        ) from None
    columns = {name: _numbers(table[name].to_pylist()) for name in names if name in _NUMBERS}
    return [
        {**row, **{name: values[number] for name, values in columns.items()}}
        for number, row in enumerate(table.to_pylist())
    ]


def _numbers(values: list[str | None]) -> list[Any]:
    """The values as numbers, where all that are there are; else as they are."""
    try:
        return [None if value is None else float(value) for value in values]
    except ValueError:
        return values


def _check_names(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    blank = any(not name.strip() for name in names)
    if twice is not None or blank:
        raise DataError(
            f"the column {twice!r} is there twice" if twice is not None else "a column has no name",
            where=where,
            why="the first line names the columns",
            fix="give each column a name of its own in the first line",
        )
