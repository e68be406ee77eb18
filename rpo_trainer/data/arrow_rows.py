"""Rows of an Arrow table, read from its buffers: token ids are numpy slices of them and are not copied."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import datasets

Array = np.ndarray[Any, Any]


class ArrowRows(Sequence[dict[str, Any]]):
    """The rows of a table as dicts.

    Values are those of `datasets.Dataset`, except for lists of integers without nulls, also nested ones:
    these are read-only numpy arrays of the column's dtype.

    Args:
        table: an Arrow table with any number of chunks.
        indices: `[n]`, the rows of the table, in order; None: all.
    """

    def __init__(self, table: Any, indices: Array | None = None) -> None:
        self.table = table
        self.indices = indices
        self.batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._starts = list(accumulate((b.num_rows for b in self.batches), initial=0))
        self._readers: list[Callable[[int], dict[str, Any]] | None] = [None] * len(self.batches)
        self._count = self._starts[-1] if indices is None else len(indices)

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> ArrowRows:
        """Return the rows of a data set, whose format and transform are ignored."""
        return cls(*table_of(dataset))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        place = index % self._count if self.indices is None else int(self.indices[index])
        number = bisect_right(self._starts, place) - 1
        reader = self._readers[number]
        if reader is None:
            reader = self._readers[number] = _row_reader(self.batches[number])
        return reader(place - self._starts[number])


def table_of(dataset: datasets.Dataset) -> tuple[Any, Array | None]:
    """Return the Arrow table of a data set, and the indices of its rows if rows were selected or shuffled."""
    indices = dataset._indices
    return dataset.data.table, None if indices is None else indices.column(0).to_numpy()


def is_integer_list(kind: Any, depth: int) -> bool:
    """Whether an Arrow type is a list of integers, nested `depth` times."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    if not depth:
        return bool(pa.types.is_integer(kind))
    return _is_list(kind) and is_integer_list(kind.value_type, depth - 1)


def offsets_of(array: Any) -> Array:
    """Return `[n + 1]`, where the lists of an Arrow array start and end in `array.values`."""
    return array.offsets.to_numpy()  # type: ignore[no-any-return]


def _is_list(kind: Any) -> bool:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _row_reader(batch: Any) -> Callable[[int], dict[str, Any]]:
    names = batch.schema.names
    readers = [(name, _reader(batch.column(i))) for i, name in enumerate(names)]
    return lambda row: {name: read(row) for name, read in readers}


def _reader(array: Any) -> Callable[[int], Any]:
    """Return a function that reads one value of a column."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    read: Callable[[int, int], Any] | None = None
    if pa.types.is_string(array.type) and array.buffers()[2] is not None:
        _, starts, text = (memoryview(part) if part else part for part in array.buffers())
        offsets = starts.cast("i")[array.offset :]
        read = lambda start, stop: str(text[start:stop], "utf-8")  # noqa: E731
    elif _is_list(array.type):
        offsets = offsets_of(array).data
        read = _slicer(array.values)
    if read is None:
        return lambda row: array[row].as_py()
    part = read
    if not array.null_count:
        return lambda row: part(offsets[row], offsets[row + 1])
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: part(offsets[row], offsets[row + 1]) if valid[row] else None


def _slicer(values: Any) -> Callable[[int, int], Any] | None:
    """Return a function (start, stop) → part of the values; None for types without one."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    if values.null_count:
        return None
    if pa.types.is_integer(values.type):
        integers = values.to_numpy()
        return lambda start, stop: integers[start:stop]
    if pa.types.is_floating(values.type):
        floats = values.to_numpy()
        return lambda start, stop: floats[start:stop].tolist()
    part = _slicer(values.values) if _is_list(values.type) else None
    if part is None:
        return None
    inner, offsets = part, offsets_of(values).data
    return lambda start, stop: [
        inner(*ends) for ends in pairwise(offsets[start : stop + 1].tolist())
    ]
