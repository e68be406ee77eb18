"""Which examples meet in which optimizer step: a pure function of seed, epoch and step.

An epoch is a permutation, cut into global batches. Within one, examples are dealt by cost, longest first
and in snake order, into ranks × accumulation bins of equal count: a permutation inside one optimizer step,
so the update is that of any other order, and no rank waits long for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of `range(examples)`; a function of its arguments alone, on every machine."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(examples)


def deal(batch: Sequence[int], costs: Sequence[int], bins: int) -> list[list[int]]:
    """Deals a global batch into bins whose counts differ by one at most.

    Args:
        batch: example indices.
        costs: cost of every example of the data set, by index.
        bins: number of bins; with fewer examples than bins some stay empty.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    by_cost = sorted(batch, key=lambda i: (-costs[i], i))
    for turn, index in enumerate(by_cost):
        lap, place = divmod(turn, bins)
        dealt[place if lap % 2 == 0 else bins - 1 - place].append(index)
    return dealt


class StepBatchSampler:
    """Micro-batches of one rank, epoch after epoch, as lists of example indices.

    Every rank gets the same number of micro-batches; where a last batch has fewer examples than ranks,
    some are empty lists, and the collator puts in an example of weight zero.

    Args:
        costs: cost of every example, such as its tokens.
        global_batch_size: examples of one optimizer step, over all ranks.
        micro_batch_size: the most examples of one forward of one rank.
        shuffle: False: longest first, for evaluation.
        drop_last: leave out the last global batch of an epoch if it is not full.
    """

    def __init__(
        self,
        costs: Sequence[int],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.costs = list(costs)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration."""
        self.epoch = epoch

    def global_batches(self) -> list[list[int]]:
        """The epoch's optimizer steps, each a list of example indices."""
        if self.shuffle:
            order = epoch_order(len(self.costs), self.seed, self.epoch).tolist()
        else:
            order = sorted(range(len(self.costs)), key=lambda i: (-self.costs[i], i))
        size = self.global_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.drop_last and batches and len(batches[-1]) < size:
            batches.pop()
        return batches

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
