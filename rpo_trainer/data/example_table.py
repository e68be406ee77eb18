"""Tokenized examples → Arrow, a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo_trainer.errors import DataError, first_line

if TYPE_CHECKING:
    import datasets

NUMBERS = ("rewards", "attributes")  # lists of float64, in which numbers may be missing
_BATCH = 500  # rows that are held as given

_FORM = (
    "a tokenized example has `prompt_ids`, a list of token ids, and `response_ids` and `response_mask`, a "
    "list of integers for each response"
)


def example_dataset(rows: Any) -> datasets.Dataset:
    """Return tokenized examples as a data set in memory: token ids int32, masks int8.

    Args:
        rows: a list of examples (see `rpo_trainer.data.example_view`), or any object with `len()` and
            examples by index; each is read once. Values may be lists, arrays or tensors.

    Raises:
        DataError: a row is not a tokenized example, or another column has values of several types.
    """
    table = ExampleTable()
    for number in range(len(rows)):
        table.add(rows[number])
    return table.dataset()


class ExampleTable:
    """Collects examples in an Arrow table; only those of one batch are held as Python objects."""

    def __init__(self) -> None:
        self._tables: list[Any] = []
        self._waiting: list[Mapping[str, Any]] = []
        self._count = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Add an example."""
        self._waiting.append(row)
        if len(self._waiting) == _BATCH:
            self._flush()

    def dataset(self) -> datasets.Dataset:
        """Return the examples."""
        import datasets
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        if self._waiting or not self._tables:
            self._flush()
        try:
            table = pa.concat_tables(self._tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                "a column of the tokenized data has values of several types",
                code="data.tokenized-column",
                why=first_line(error),
                fix="give the column values of one type, or remove it",
            ) from error
        return datasets.Dataset(datasets.table.InMemoryTable(table))

    def _flush(self) -> None:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

        rows, first = self._waiting, self._count
        prompts: list[Any] = []
        responses: list[list[Any]] = []
        masks: list[list[Any]] = []
        for number, row in enumerate(rows, start=first):
            try:
                prompts.append(_integers(row["prompt_ids"]))
                responses.append([_integers(ids) for ids in row["response_ids"]])
                masks.append([_integers(mask) for mask in row["response_mask"]])
            except (TypeError, ValueError, KeyError, IndexError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"row {number} is not a tokenized example",
                    code="data.tokenized-row",
                    details={"row": number},
                    why=_FORM,
                    fix="correct the row",
                ) from error
        columns = {
            "prompt_ids": _lists(prompts, _flat("prompt_ids", prompts, pa.int32())),
            "response_ids": _nested("response_ids", responses, pa.int32()),
            "response_mask": _nested("response_mask", masks, pa.int8()),
        }
        others = dict.fromkeys(name for row in rows for name in row if name not in columns)
        columns |= {name: _column(name, [row.get(name) for row in rows]) for name in others}
        order = [name for name in ("id", "source") if name in columns]
        self._tables.append(
            pa.table({name: columns[name] for name in dict.fromkeys([*order, *columns])})
        )
        self._waiting, self._count = [], first + len(rows)


def _integers(values: Any) -> Any:
    found = np.asarray(values)
    if found.ndim != 1 or (found.dtype.kind not in "iub" and len(found)):
        raise TypeError(f"not a list of integers: {found.dtype} of shape {found.shape}")
    return found


def _flat(name: str, lists: Sequence[Any], kind: Any) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    # Lists without elements have no dtype of their own.
    filled = [values for values in lists if len(values)]
    flat = np.concatenate(filled) if filled else np.zeros(0, dtype=np.int64)
    try:
        return pa.array(flat).cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"the column {name} of the tokenized data has values outside of {kind}",
            code="data.tokenized-column",
            details={"column": name},
            why=first_line(error),
            fix="correct the values",
        ) from error


def _lists(lists: Sequence[Any], values: Any) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _nested(name: str, lists: Sequence[Sequence[Any]], kind: Any) -> Any:
    inner = [values for each in lists for values in each]
    return _lists(lists, _lists(inner, _flat(name, inner, kind)))


def _column(name: str, values: list[Any]) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    plain = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    try:
        return pa.array(plain, type=pa.list_(pa.float64()) if name in NUMBERS else None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the column {name} of the tokenized data has values of several types",
            code="data.tokenized-column",
            details={"column": name},
            why=first_line(error),
            fix="give the column values of one type, or remove it",
        ) from error
