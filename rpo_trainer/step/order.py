"""Assignment of examples to optimizer steps, ranks and micro-batches: a pure function of seed, epoch and
step.

An epoch is a permutation of the data, or its order, divided into global batches. Within a global batch,
examples are dealt by cost, longest first and in snake order, into ranks × accumulation steps bins of equal
count, or into as many bins as a token budget requires. This only permutes examples within an optimizer
step, so it does not change the update, and balances the load of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Order = Literal["random", "data", "longest"]


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `range(examples)` that only depends on the arguments, on any machine."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(examples)


def deal(batch: Sequence[int], costs: Sequence[int], bins: int) -> list[list[int]]:
    """Deal a global batch into bins whose sizes differ by at most one.

    Args:
        batch: example indices.
        costs: cost of every example of the data set, by index.
        bins: number of bins; with fewer examples than bins, some stay empty.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    by_cost = sorted(batch, key=lambda i: (-costs[i], i))
    for turn, index in enumerate(by_cost):
        lap, place = divmod(turn, bins)
        dealt[place if lap % 2 == 0 else bins - 1 - place].append(index)
    return dealt


@dataclass
class _Bin:
    """Examples of one forward: `rows` rows of the length of the longest."""

    items: list[int] = field(default_factory=list)
    rows: int = 0
    length: int = 0

    def cost_with(self, rows: int = 0, length: int = 0) -> int:
        return (self.rows + rows) * max(self.length, length)

    def add(self, index: int, rows: int, length: int) -> None:
        self.items.append(index)
        self.rows += rows
        self.length = max(self.length, length)


def deal_within(
    batch: Sequence[int], shapes: Sequence[tuple[int, int]], budget: int, ranks: int = 1
) -> list[list[int]]:
    """Deal a global batch into the bins that first fit needs for a budget, then balance them.

    Args:
        batch: example indices.
        shapes: (rows, length) of every example of the data set, by index. A bin costs Σ rows × its maximum
            length. In packed rows every token counts as a row of length one.
        budget: maximum cost of a bin; an example that costs more has its own bin.
        ranks: the number of bins is a multiple of it; some bins may be empty.

    Returns:
        Bins of indices, the most expensive first, so that adjacent bins have similar costs.
    """
    order = sorted(batch, key=lambda i: (-shapes[i][1], -shapes[i][0], i))
    bins: list[_Bin] = []
    for index in order:
        place = next((b for b in bins if b.cost_with(*shapes[index]) <= budget), None)
        if place is None:
            bins.append(place := _Bin())
        place.add(index, *shapes[index])
    bins += [_Bin() for _ in range(-len(bins) % ranks)]
    even = [_Bin() for _ in bins]
    for index in order:
        min(even, key=lambda b: b.cost_with(*shapes[index])).add(index, *shapes[index])
    if all(b.cost_with() <= budget or len(b.items) == 1 for b in even):
        bins = even
    return [b.items for b in sorted(bins, key=lambda b: -b.cost_with())]


class GlobalBatches:
    """The optimizer steps of an epoch, each a list of example indices over all ranks.

    Args:
        costs: cost of every example, such as its number of tokens.
        global_batch_size: number of examples per optimizer step, over all ranks.
        order: `random`, a new permutation in each epoch; `data`, the order of the data; `longest`, longest
            first, for evaluation and reference passes.
        drop_last: drop the last global batch of an epoch if it is incomplete.
    """

    def __init__(
        self,
        costs: Sequence[int],
        *,
        global_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        order: Order = "random",
        drop_last: bool = False,
    ) -> None:
        self.costs = list(costs)
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.order: Order = order
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and with it the permutation."""
        self.epoch = epoch

    def global_batches(self) -> list[list[int]]:
        """Return the optimizer steps of the epoch, each a list of example indices."""
        order = list(range(len(self.costs)))
        if self.order == "random":
            order = epoch_order(len(self.costs), self.seed, self.epoch).tolist()
        elif self.order == "longest":
            order.sort(key=lambda i: (-self.costs[i], i))
        size = self.global_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.drop_last and batches and len(batches[-1]) < size:
            batches.pop()
        return batches


class StepBatchSampler(GlobalBatches):
    """Micro-batches of one rank as lists of example indices.

    All ranks have the same number of micro-batches. If a global batch has fewer examples than ranks, some
    lists are empty, for which the collator inserts an example with weight zero.

    Args:
        costs, settings: see `GlobalBatches`.
        micro_batch_size: maximum number of examples per forward and rank.
    """

    def __init__(self, costs: Sequence[int], *, micro_batch_size: int, **settings: Any) -> None:
        super().__init__(costs, **settings)
        self.micro_batch_size = micro_batch_size

    def _accumulation(self, examples: int) -> int:
        return -(-examples // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            steps = self._accumulation(len(batch))
            bins = deal(batch, self.costs, steps * self.world_size)
            yield from bins[self.rank :: self.world_size]

    def __len__(self) -> int:
        full, rest = divmod(len(self.costs), self.global_batch_size)
        last = 0 if self.drop_last else self._accumulation(rest)
        return full * self._accumulation(self.global_batch_size) + last


class TokenBudgetSampler(GlobalBatches):
    """Optimizer steps of one rank, each a list of micro-batches within a token budget.

    All ranks have the same number of micro-batches in each step, the most expensive first; some are empty if
    there are more ranks than micro-batches.

    Args:
        shapes: (rows, length) of every example, see `deal_within`.
        budget: maximum number of tokens per forward and rank; a longer example has its own forward.
        settings: see `GlobalBatches`.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], *, budget: int, **settings: Any) -> None:
        super().__init__([rows * length for rows, length in shapes], **settings)
        self.shapes = list(shapes)
        self.budget = budget

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self.global_batches():
            bins = deal_within(batch, self.shapes, self.budget, self.world_size)
            yield bins[self.rank :: self.world_size]

    def __len__(self) -> int:
        full, rest = divmod(len(self.costs), self.global_batch_size)
        return full + bool(rest and not self.drop_last)
