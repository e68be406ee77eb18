"""Tokenized examples as a data set, and collators that pack them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rpo_trainer.step.batch import Layout, PackedBatch, StepBatch
from rpo_trainer.step.packing import forward_tokens, pack

logger = logging.getLogger(__name__)


class Examples(Dataset[dict[str, Any]]):
    """Rows of a tokenized data set, with additional columns that are computed later.

    Args:
        rows: a `datasets.Dataset` or any sequence of tokenized examples (see `rpo_trainer.step.packing`).
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.extra: dict[str, Sequence[Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        for name, values in self.extra.items():
            row[name] = values[index]
        return row

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Return the rows of a micro-batch, or nested lists for the micro-batches of a step."""
        return [self.__getitems__(i) if isinstance(i, list) else self[i] for i in indices]

    def without(self, column: str) -> np.ndarray:
        """Return the indices of the examples whose `column` is missing or null."""
        if column in self.extra:
            values: Any = self.extra[column]
        elif not hasattr(self.rows, "with_format"):
            values = [row.get(column) for row in self.rows]
        elif column not in self.rows.column_names:
            return np.arange(len(self.rows))
        else:
            values = self.rows.with_format("arrow")[:][column]
            return np.flatnonzero(values.is_null().to_numpy())
        return np.flatnonzero([value is None for value in values])

    def response_counts(self) -> np.ndarray:
        """Return the K of each example."""
        return np.array([len(lengths) for lengths in self._response_lengths()], dtype=np.int64)

    def costs(self, layout: Layout) -> list[int]:
        """Return the number of tokens of a forward pass of each example."""
        if not hasattr(self.rows, "with_format"):
            return [forward_tokens(self.rows[i], layout) for i in range(len(self.rows))]
        prompts = self._lengths("prompt_ids")
        return [
            (1 if layout == "shared" else len(lengths)) * int(prompt) + int(sum(lengths))
            for prompt, lengths in zip(prompts, self._response_lengths(), strict=True)
        ]

    def shapes(self, layout: Layout) -> list[tuple[int, int]]:
        """Return (rows, length) of each example: a forward costs Σ rows × maximum length, in tokens.

        In the padded layout an example is K rows of the length of the longest; otherwise each token is a row
        of length 1.
        """
        if layout != "padded":
            return [(cost, 1) for cost in self.costs(layout)]
        prompts = (
            self._lengths("prompt_ids")
            if hasattr(self.rows, "with_format")
            else [len(row["prompt_ids"]) for row in self.rows]
        )
        return [
            (len(lengths), prompt + max(lengths))
            for prompt, lengths in zip(prompts, self._response_lengths(), strict=True)
        ]

    def _lengths(self, column: str) -> list[int]:
        import pyarrow.compute as pc

        table = self.rows.with_format("arrow")[:]
        return pc.list_value_length(table[column]).to_pylist()  # type: ignore[no-any-return]

    def _response_lengths(self) -> list[list[int]]:
        if not hasattr(self.rows, "with_format"):
            return [list(map(len, row["response_ids"])) for row in self.rows]
        import pyarrow.compute as pc

        column = self.rows.with_format("arrow")[:]["response_ids"]
        counts = pc.list_value_length(column).to_pylist()
        inner = pc.list_value_length(pc.list_flatten(column)).to_pylist()
        stops = np.cumsum(counts).tolist()
        return [inner[stop - count : stop] for stop, count in zip(stops, counts, strict=True)]


class PackingCollator:
    """Packs a list of examples into a micro-batch; an empty list results in a filler of weight 0."""

    def __init__(self, layout: Layout, pad_token_id: int, examples: Examples | None = None) -> None:
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.examples = examples

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> PackedBatch:
        rows = examples or self._filler()
        return pack(rows, self.layout, pad_token_id=self.pad_token_id, filler=not examples)

    def _filler(self) -> Sequence[Mapping[str, Any]]:
        if self.examples is None:
            raise ValueError("an empty micro-batch requires a data set for its filler")
        return [self.examples[0]]


class StepCollator:
    """Collates the micro-batches of an optimizer step, and adds up their counts."""

    def __init__(self, collate: PackingCollator) -> None:
        self.collate = collate

    def __call__(self, step: Sequence[Sequence[Mapping[str, Any]]]) -> StepBatch:
        batches = tuple(self.collate(examples) for examples in step)
        return StepBatch(batches, counts=torch.stack([batch.counts for batch in batches]).sum(0))
