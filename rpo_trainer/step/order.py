"""Assignment of examples to optimizer steps, ranks and micro-batches: a pure function of seed, epoch and
step.

An epoch is a permutation of the data, or its order, divided into global batches. The examples of a global
batch are dealt to ranks and micro-batches by least load, see `rpo_trainer.step.dealing`.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rpo_trainer.step.dealing import Dealt, deal, deal_within, loads, micro_batches

Order = Literal["random", "data", "longest"]


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `range(examples)` that only depends on the arguments, on any machine."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(examples)


class GlobalBatches:
    """The optimizer steps of an epoch, each a list of example indices over all ranks.

    Args:
        sizes: tokens of every example, `[N]`, or their (rows, length) in padded rows, `[N, 2]`; see
            `deal_within`.
        global_batch_size: number of examples per optimizer step, over all ranks.
        order: `random`, a new permutation in each epoch; `data`, the order of the data; `longest`, longest
            first, for evaluation and reference passes.
        drop_last: drop the last global batch of an epoch if it is incomplete.
    """

    def __init__(
        self,
        sizes: Sequence[Any] | np.ndarray,
        *,
        global_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        order: Order = "random",
        drop_last: bool = False,
    ) -> None:
        given = np.asarray(sizes, dtype=np.int64)
        self.shapes = given if given.ndim == 2 else np.stack([given, np.ones_like(given)], axis=1)
        self.costs: np.ndarray = self.shapes.prod(axis=1)
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.order: Order = order
        self.drop_last = drop_last
        self.epoch = 0

    @abstractmethod
    def deal(self, batch: Sequence[int]) -> Dealt:
        """Return the micro-batches of all ranks for a global batch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and with it the permutation."""
        self.epoch = epoch

    def global_batches(self) -> Iterator[list[int]]:
        """Yield the optimizer steps of the epoch, each a list of example indices."""
        examples, size = len(self.costs), self.global_batch_size
        if self.order == "random":
            order = epoch_order(examples, self.seed, self.epoch)
        elif self.order == "longest":
            order = np.argsort(-self.costs, kind="stable")
        else:
            order = np.arange(examples)
        stop = examples - examples % size if self.drop_last else examples
        for start in range(0, stop, size):
            yield order[start : start + size].tolist()

    def loads(self, steps: int | None = None) -> Iterator[np.ndarray]:
        """Yield the tokens of all micro-batches of each optimizer step, `[ranks, micro-batches]`.

        Args:
            steps: the first ones of the epoch; None: all.
        """
        for batch in itertools.islice(self.global_batches(), steps):
            yield loads(self.deal(batch), self.shapes)


class StepBatchSampler(GlobalBatches):
    """Micro-batches of one rank as lists of example indices.

    All ranks have the same number of micro-batches. If a global batch has fewer examples than ranks, some
    lists are empty, for which the collator inserts an example with weight zero.

    Args:
        sizes, settings: see `GlobalBatches`.
        micro_batch_size: maximum number of examples per forward and rank.
    """

    def __init__(
        self, sizes: Sequence[Any] | np.ndarray, *, micro_batch_size: int, **settings: Any
    ) -> None:
        super().__init__(sizes, **settings)
        self.micro_batch_size = micro_batch_size

    def _accumulation(self, examples: int) -> int:
        return micro_batches(examples, self.world_size, self.micro_batch_size)

    def deal(self, batch: Sequence[int]) -> Dealt:
        """Return the micro-batches of all ranks for a global batch."""
        return deal(batch, self.costs, ranks=self.world_size, most=self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            yield from self.deal(batch)[self.rank]

    def __len__(self) -> int:
        full, rest = divmod(len(self.costs), self.global_batch_size)
        last = 0 if self.drop_last else self._accumulation(rest)
        return full * self._accumulation(self.global_batch_size) + last


class TokenBudgetSampler(GlobalBatches):
    """Optimizer steps of one rank, each a list of micro-batches within a token budget.

    All ranks have the same number of micro-batches in each step; some are empty if there are more ranks than
    examples.

    Args:
        sizes, settings: see `GlobalBatches`.
        budget: maximum number of tokens per forward and rank; a longer example has its own forward.
        micro_batch_size: maximum number of forwards, as that of micro-batches of so many examples: a step
            that needs more is dealt by this number instead. None: no maximum.
    """

    def __init__(
        self,
        sizes: Sequence[Any] | np.ndarray,
        *,
        budget: int,
        micro_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(sizes, **settings)
        self.budget = budget
        self.micro_batch_size = micro_batch_size

    def deal(self, batch: Sequence[int]) -> Dealt:
        """Return the micro-batches of all ranks for a global batch."""
        dealt = deal_within(batch, self.shapes, self.budget, ranks=self.world_size)
        most = self.micro_batch_size
        if most is not None and len(dealt[0]) > micro_batches(len(batch), self.world_size, most):
            return deal(batch, self.costs, ranks=self.world_size, most=most)
        return dealt

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self.global_batches():
            yield self.deal(batch)[self.rank]

    def __len__(self) -> int:
        full, rest = divmod(len(self.costs), self.global_batch_size)
        return full + bool(rest and not self.drop_last)
