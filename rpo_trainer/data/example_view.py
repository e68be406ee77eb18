"""Tokenized examples in Arrow: one by one as dicts, and all at once as lengths, flat values and a digest.

Nothing is held for each example, so that data in a memory-mapped file need no memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from rpo_trainer.data.arrow_rows import Array, ArrowRows, is_integer_list, offsets_of, table_of
from rpo_trainer.data.example_table import NUMBERS, example_dataset
from rpo_trainer.data.tokenize import TOKENIZED
from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    import datasets

_BLOCK = 512  # rows of which flat values are handled at once


class Block(NamedTuple):
    """Consecutive examples: the values of all lists of a column, and the length of each list.

    The arrays may be slices of the data and have its dtypes; lengths are int64.

    Attributes:
        response_counts: K of each example; the lists of `response_ids` and `response_mask` are those of all
            its responses.
    """

    prompt_ids: Array
    prompt_lengths: Array
    response_counts: Array
    response_ids: Array
    response_lengths: Array
    response_mask: Array
    mask_lengths: Array


# Types in which the fields of a block are digested.
_DIGESTED = {
    "prompt_ids": np.int32,
    "prompt_lengths": np.int64,
    "response_counts": np.int64,
    "response_ids": np.int32,
    "response_lengths": np.int64,
    "response_mask": np.int8,
    "mask_lengths": np.int64,
}


class ExampleView(ArrowRows):
    """The examples of a tokenized data set, read from its buffers.

    An example is a dict: `prompt_ids`, an integer array `[p]`; `response_ids` and `response_mask`, lists of K
    integer arrays; `rewards` and `attributes`, lists of float or None, if there are such columns; further
    columns, such as `id`. `rpo_trainer` stores token ids as int32 and masks as int8; data of others may have
    other integer types.

    Args:
        dataset: a data set with the columns `prompt_ids`, `response_ids` and `response_mask`. Its format and
            transform are ignored.

    Raises:
        DataError: a column is missing, has null values, or is not a list of integers.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        table, indices = table_of(dataset)
        super().__init__(_canonical(table, indices), indices)
        self.dataset = dataset

    def __reduce__(self) -> Any:
        # A data set that is mapped from a file is pickled as the path of the file.
        return ExampleView, (self.dataset,)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.table.column_names)

    def without(self, column: str) -> Array:
        """Return the indices of the examples whose `column` is missing or null."""
        if column not in self.column_names:
            return np.arange(len(self))
        return np.flatnonzero(self._selected(_is_null(self.table[column])))

    # --- lengths ---

    def prompt_lengths(self) -> Array:
        """Return `[n]` int64, the tokens of each prompt."""
        return self._selected(self._lengths("prompt_ids"))

    def response_counts(self) -> Array:
        """Return `[n]` int64, the K of each example."""
        return self._selected(self._lengths("response_ids"))

    def response_lengths(self) -> Array:
        """Return `[Σ K]` int64, the tokens of each response, in the order of the examples."""
        parts = [np.diff(_nested(b.column("response_ids"))[1]) for b in self.batches]
        found = _joined(parts)
        if self.indices is None:
            return found
        counts = self._lengths("response_ids")
        starts, chosen = (np.cumsum(counts) - counts)[self.indices], counts[self.indices]
        first = np.cumsum(chosen) - chosen
        places: Array = np.repeat(starts - first, chosen) + np.arange(chosen.sum())
        return found[places]

    def _lengths(self, column: str) -> Array:
        return _joined([np.diff(offsets_of(batch.column(column))) for batch in self.batches])

    def _selected(self, values: Array) -> Array:
        return values if self.indices is None else values[self.indices]

    # --- values ---

    def blocks(self) -> Iterator[Block]:
        """Yield all examples in order, a few hundred at a time."""
        if self.indices is None:
            for batch in self.batches:
                yield from _batch_blocks(batch)
            return
        rows = ArrowRows(self.table.select(TOKENIZED), self.indices)
        for start in range(0, len(rows), _BLOCK):
            yield _block_of(rows[start : start + _BLOCK])

    def fingerprint(self) -> str:
        """Return the xxh3-128 digest of tokens, masks, and rewards or ratings, in the order of the examples.

        It does not depend on other columns, on how the data are stored, or on the integer types.
        """
        digests = _Digests()
        for block in self.blocks():
            for (name, kind), values in zip(_DIGESTED.items(), block, strict=True):
                digests.add(name, values, kind)
        for name in NUMBERS:
            if name in self.column_names:
                column = self.table[name]
                digests.add_numbers(
                    name, column if self.indices is None else column.take(self.indices)
                )
        return digests.hexdigest()


def example_view(rows: Any) -> ExampleView:
    """Return a view of tokenized examples, which are converted to Arrow unless they are a `datasets.Dataset`.

    Args:
        rows: a view, a `datasets.Dataset`, a list, or any object with `len()` and rows by index; each row is
            read once.

    Raises:
        DataError: the rows are not tokenized examples, see `ExampleView` and `example_dataset`.
    """
    import datasets

    if isinstance(rows, ExampleView):
        return rows
    if isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom":
        return ExampleView(rows)
    return ExampleView(example_dataset(rows))


# --- checks ---


def _canonical(table: Any, indices: Array | None) -> Any:
    """Return the table with columns that can be sliced; columns that can be already are not copied."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    missing = [name for name in TOKENIZED if name not in table.column_names]
    if missing:
        raise DataError(
            f"the data are not tokenized examples: they lack {', '.join(missing)}",
            code="data.tokenized-column",
            details={"column": missing[0]},
            fix=f"give each row the columns {', '.join(TOKENIZED)}",
        )
    for name in TOKENIZED:
        depth = 1 if name == "prompt_ids" else 2
        if not is_integer_list(table[name].type, depth):
            kind = pa.int8() if name == "response_mask" else pa.int32()
            table = _cast(table, name, pa.list_(kind) if depth == 1 else pa.list_(pa.list_(kind)))
        empty = _is_null(table[name]) if table[name].null_count else np.zeros(0, dtype=bool)
        rows = np.flatnonzero(empty if indices is None or not len(empty) else empty[indices])
        if len(rows) or _inner_nulls(table[name], depth):
            raise DataError(
                f"the column {name} of the tokenized data has null values"
                + (f", the first in row {rows[0]}" if len(rows) else ""),
                code="data.tokenized-column",
                details={"column": name, "rows": rows.tolist()},
                fix="remove the rows with null values",
            )
    for name in NUMBERS:
        if name in table.column_names and not _is_floats(table[name].type):
            table = _cast(table, name, pa.list_(pa.float64()))
    return table


def _cast(table: Any, name: str, kind: Any) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    try:
        column = table[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"the column {name} of the tokenized data has the type {table[name].type}",
            code="data.tokenized-column",
            details={"column": name},
            fix=f"store it as {kind}",
        ) from error
    return table.set_column(table.column_names.index(name), name, column)


def _is_floats(kind: Any) -> bool:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


def _inner_nulls(column: Any, depth: int) -> bool:
    """Whether a list in lists, or a number, is null."""
    for chunk in column.chunks:
        values = chunk
        for _ in range(depth):
            values = values.flatten()
            if values.null_count:
                return True
    return False


def _is_null(column: Any) -> Array:
    return column.is_null().to_numpy()  # type: ignore[no-any-return]


# --- flat values ---


def _nested(array: Any) -> tuple[Array, Array]:
    """Return the offsets of lists of lists, and those of the inner lists."""
    outer = offsets_of(array)
    return outer, offsets_of(array.values)[outer[0] : outer[-1] + 1]


def _joined(parts: Iterable[Array]) -> Array:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _batch_blocks(batch: Any) -> Iterator[Block]:
    prompts, responses, masks = (batch.column(name) for name in TOKENIZED)
    prompt_offsets = offsets_of(prompts)
    outer, inner = _nested(responses)
    mask_outer, mask_inner = _nested(masks)
    prompt_ids, response_ids = prompts.values.to_numpy(), responses.values.values.to_numpy()
    mask_values = masks.values.values.to_numpy()
    for start in range(0, batch.num_rows, _BLOCK):
        rows = slice(start, start + _BLOCK + 1)
        own = prompt_offsets[rows]
        counts = outer[rows]
        texts = inner[counts[0] - outer[0] : counts[-1] - outer[0] + 1]
        mask_counts = mask_outer[rows]
        marks = mask_inner[mask_counts[0] - mask_outer[0] : mask_counts[-1] - mask_outer[0] + 1]
        yield Block(
            prompt_ids[own[0] : own[-1]],
            np.diff(own).astype(np.int64),
            np.diff(counts).astype(np.int64),
            response_ids[texts[0] : texts[-1]],
            np.diff(texts).astype(np.int64),
            mask_values[marks[0] : marks[-1]],
            np.diff(marks).astype(np.int64),
        )


def _block_of(rows: list[dict[str, Any]]) -> Block:
    prompts = [row["prompt_ids"] for row in rows]
    responses = [ids for row in rows for ids in row["response_ids"]]
    masks = [mask for row in rows for mask in row["response_mask"]]
    counts = np.array([len(row["response_ids"]) for row in rows], dtype=np.int64)
    return Block(*_flat(prompts), counts, *_flat(responses), *_flat(masks))


def _flat(lists: list[Array]) -> tuple[Array, Array]:
    lengths = np.array([len(values) for values in lists], dtype=np.int64)
    return np.concatenate(lists) if lists else np.zeros(0, dtype=np.int32), lengths


class _Digests:
    """A digest of each array, fed part by part, so that the division into parts does not matter."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def add(self, name: str, values: Array, kind: Any) -> None:
        part = self.parts.setdefault(name, xxhash.xxh3_128())
        part.update(np.ascontiguousarray(values, dtype=kind))

    def add_numbers(self, name: str, column: Any) -> None:
        """Add lists of numbers; a missing list has the length -1."""
        for chunk in column.chunks:
            flat = chunk.flatten()  # without the missing lists
            lengths = chunk.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
            self.add(f"{name} lengths", lengths, np.int64)
            self.add(f"{name} nulls", flat.is_null().to_numpy(zero_copy_only=False), np.int8)
            self.add(name, flat.fill_null(0).to_numpy(zero_copy_only=False), np.float64)

    def hexdigest(self) -> str:
        digest = xxhash.xxh3_128()
        for name in sorted(self.parts):
            digest.update(f"{name} {self.parts[name].hexdigest()}\n".encode())
        return digest.hexdigest()
