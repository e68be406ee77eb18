"""Tokenised examples as a data set, and the collator that packs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rpo_trainer.batch import Layout, forward_tokens, pack


class Examples(Dataset[dict[str, Any]]):
    """Rows of a tokenised data set, with columns computed later laid beside them.

    Args:
        rows: a `datasets.Dataset` or any sequence of tokenised examples (see `rpo_trainer.batch`).
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

    def response_counts(self) -> np.ndarray:
        """K of each example."""
        return np.array([len(lengths) for lengths in self._response_lengths()], dtype=np.int64)

    def costs(self, layout: Layout) -> list[int]:
        """Tokens that one forward of each example takes."""
        if not hasattr(self.rows, "with_format"):
            return [forward_tokens(self.rows[i], layout) for i in range(len(self.rows))]
        prompts = self._lengths("prompt_ids")
        return [
            (1 if layout == "shared" else len(lengths)) * int(prompt) + int(sum(lengths))
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
    """A list of examples → one packed micro-batch, with the weights and counts of its examples.

    Adds to `batch.pack`:
        weights: `[B]` in the order of the groups; 0 for the filler of a rank that has no example left.
        counts: `[2]` float64: examples, and trained tokens of their first (chosen) responses.
    """

    def __init__(self, layout: Layout, pad_token_id: int, examples: Examples | None = None) -> None:
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.examples = examples

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        real = bool(examples)
        if not real:
            if self.examples is None:
                raise ValueError("an empty micro-batch needs a data set to take its filler from")
            examples = [self.examples[0]]
        batch = pack(examples, self.layout, pad_token_id=self.pad_token_id)
        tokens = sum(sum(example["response_mask"][0]) for example in examples)
        batch["weights"] = torch.full((len(examples),), float(real))
        batch["counts"] = torch.tensor(
            [len(examples), tokens] if real else [0, 0], dtype=torch.float64
        )
        return batch


class EpochLoader(DataLoader[Any]):
    """A loader that hands the epoch on to our sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def to_device(data: Any, device: torch.device) -> Any:
    """Tensors of a nested batch on the device; everything else, and every dtype, as it is."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {name: to_device(value, device) for name, value in data.items()}
    if isinstance(data, tuple):
        return tuple(to_device(value, device) for value in data)
    return data
