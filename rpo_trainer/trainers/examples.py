"""Tokenized examples as a data set, and collators that pack them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rpo_trainer.data.example_view import example_view
from rpo_trainer.step.batch import Layout, PackedBatch, StepBatch
from rpo_trainer.step.packing import forward_costs, pack

logger = logging.getLogger(__name__)


class Examples(Dataset[dict[str, Any]]):
    """Tokenized examples, with additional columns that are computed later.

    Args:
        rows: a `datasets.Dataset`, which may be mapped from a file, or any sequence of tokenized examples
            (see `rpo_trainer.step.packing`), which is read once and stored as Arrow.

    Attributes:
        view: the examples as dicts of arrays.
        extra: a value for each example, by name of the column; numbers belong in arrays or in a `Ragged`.

    Raises:
        DataError: the rows are not tokenized examples.
    """

    def __init__(self, rows: Any) -> None:
        self.view = example_view(rows)
        self.extra: dict[str, Sequence[Any]] = {}

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.view[index]
        for name, values in self.extra.items():
            row[name] = values[index]
        return row

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Return the rows of a micro-batch, or nested lists for the micro-batches of a step."""
        return [self.__getitems__(i) if isinstance(i, list) else self[i] for i in indices]

    def without(self, column: str) -> np.ndarray:
        """Return the indices of the examples whose `column` is missing or null."""
        if column not in self.extra:
            return self.view.without(column)
        return np.flatnonzero([value is None for value in self.extra[column]])

    def response_counts(self) -> np.ndarray:
        """Return the K of each example."""
        return self.view.response_counts()

    def costs(self, layout: Layout) -> np.ndarray:
        """Return `[n]` int64, the number of tokens of a forward pass of each example."""
        return forward_costs(self.view, layout)

    def shapes(self, layout: Layout) -> np.ndarray:
        """Return `[n, 2]` int64, (rows, length) of each example.

        A forward costs Σ rows × maximum length, in tokens. In the padded layout an example is K rows of the
        length of the longest; otherwise each token is a row of length 1.
        """
        if layout != "padded":
            costs = self.costs(layout)
            return np.stack([costs, np.ones_like(costs)], axis=1)
        counts = self.view.response_counts()
        longest = np.zeros_like(counts)
        owner = np.repeat(np.arange(len(counts)), counts)
        np.maximum.at(longest, owner, self.view.response_lengths())
        return np.stack([counts, self.view.prompt_lengths() + longest], axis=1)


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
