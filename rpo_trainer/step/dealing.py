"""Deals the examples of an optimizer step to ranks and micro-batches by least load.

The load of a micro-batch is the number of tokens of its forward pass. Ranks wait for each other once per
step (DDP, ZeRO-1), or in each micro-batch (FSDP, ZeRO-2, ZeRO-3), so that a step takes

    once per step      max over ranks of Σ over micro-batches
    each micro-batch   Σ over micro-batches of max over ranks

Both are kept close to the mean over ranks. Dealing only permutes examples within an optimizer step, and the
loss is divided by counts of the global batch, so that dealing does not change the update.

Longest first to the least load: Graham, "Bounds on multiprocessing timing anomalies", 1969.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Dealt = list[list[list[int]]]
"""Example indices, by rank and micro-batch."""


def micro_batches(examples: int, ranks: int, most: int) -> int:
    """Return the number of micro-batches of at most `most` examples that each rank needs."""
    return -(-examples // (ranks * most))


def deal(
    batch: Sequence[int], costs: Sequence[int] | np.ndarray, *, ranks: int, most: int
) -> Dealt:
    """Deal a global batch into micro-batches of a limited number of examples.

    Each example, longest first, goes to the rank with the least load that is not full; those of a rank go to
    its micro-batches in the same way.

    Args:
        batch: example indices.
        costs: tokens of every example of the data set, by index.
        most: maximum number of examples of a micro-batch. Numbers of examples differ between micro-batches
            only if `batch` does not fill all of them; some may be empty.

    Returns:
        `micro_batches` micro-batches for each rank, the most expensive first.
    """
    forwards = micro_batches(len(batch), ranks, most)
    cost = {index: int(costs[index]) for index in batch}
    order = sorted(batch, key=lambda index: (-cost[index], index))
    return [
        _heaviest_first(_least_load(share, cost, forwards, most=most), cost)
        for share in _least_load(order, cost, ranks, most=forwards * most)
    ]


def deal_within(
    batch: Sequence[int],
    shapes: Sequence[tuple[int, int]] | np.ndarray,
    budget: int,
    *,
    ranks: int,
) -> Dealt:
    """Deal a global batch into micro-batches of at most `budget` tokens, the same number for each rank.

    Args:
        batch: example indices.
        shapes: (rows, length) of every example of the data set, by index. A micro-batch costs Σ rows × its
            maximum length. In packed rows every token counts as a row of length one.
        budget: maximum cost of a micro-batch; an example that costs more is alone.

    Returns:
        Micro-batches of each rank; some may be empty. Those with the same number on all ranks have similar
        costs.
    """
    shape = {index: (int(shapes[index][0]), int(shapes[index][1])) for index in batch}
    packed = all(length == 1 for _, length in shape.values())
    rounds = (_rounds_of_tokens if packed else _rounds_of_rows)(shape, budget, ranks)
    dealt: Dealt = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for micros in rounds:  # the most expensive one to the rank with the least load
        costs = [_cost(micro, shape) for micro in micros]
        by_cost = sorted(range(ranks), key=lambda number: -costs[number])
        by_total = sorted(range(ranks), key=lambda rank: totals[rank])
        for rank, number in zip(by_total, by_cost, strict=True):
            dealt[rank].append(micros[number])
            totals[rank] += costs[number]
    return dealt


def loads(dealt: Dealt, shapes: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Return the costs of all micro-batches, `[ranks, micro-batches]`; see `deal_within`."""
    shape = {
        index: (int(shapes[index][0]), int(shapes[index][1]))
        for rank in dealt
        for micro in rank
        for index in micro
    }
    return np.array([[_cost(micro, shape) for micro in rank] for rank in dealt], dtype=np.int64)


def idle_share(steps: Iterable[np.ndarray], *, each_micro_batch: bool) -> float:
    """Return the fraction of the ranks' time in which they wait for others: 1 − mean load / waited load.

    Args:
        steps: the loads of each optimizer step, `[ranks, micro-batches]`.
        each_micro_batch: ranks wait for the slowest one in each micro-batch, not once per step.
    """
    busy = waited = 0
    for step in steps:
        slowest = step.max(0).sum() if each_micro_batch else step.sum(1).max()
        busy += int(step.sum())
        waited += len(step) * int(slowest)
    return 1 - busy / waited if waited else 0.0


def _least_load(
    order: Sequence[int], cost: Mapping[int, int], bins: int, *, most: int
) -> list[list[int]]:
    """Return bins; each example goes to the one with the least cost that has fewer than `most`."""
    found: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for index in order:
        load, number = heapq.heappop(heap)
        found[number].append(index)
        if len(found[number]) < most:
            heapq.heappush(heap, (load + cost[index], number))
    return found


def _heaviest_first(bins: list[list[int]], cost: Mapping[int, int]) -> list[list[int]]:
    return sorted(bins, key=lambda items: -sum(cost[index] for index in items))


# --- a budget of tokens ---

Shape = Mapping[int, tuple[int, int]]
Rounds = list[list[list[int]]]  # for each round a micro-batch for every rank


def _cost(micro: Sequence[int], shape: Shape) -> int:
    return sum(shape[index][0] for index in micro) * max(
        (shape[index][1] for index in micro), default=0
    )


def _cut(micros: list[list[int]], ranks: int) -> Rounds:
    return [micros[start : start + ranks] for start in range(0, len(micros), ranks)]


def _rounds_of_tokens(shape: Shape, budget: int, ranks: int) -> Rounds:
    """Return rounds of `ranks` micro-batches of packed rows.

    All rounds but the last are filled up to the size that the step requires at least, or up to the budget if
    ranks then wait less for each other.
    """
    cost = {index: min(rows, budget) for index, (rows, _) in shape.items()}
    order = sorted(cost, key=lambda index: (-cost[index], index))
    total = sum(cost.values())
    count = -(-total // (budget * ranks))
    while True:
        least = max(cost[order[0]], -(-total // (count * ranks)))
        sizes = (least, budget) if count > 1 and least < budget else (budget,)
        tried = [_filled(order, cost, count=count, ranks=ranks, size=size) for size in sizes]
        fitting = [(costs.max(1).sum(), rounds) for costs, rounds in tried if costs.max() <= budget]
        if fitting:
            return min(fitting, key=lambda one: one[0])[1]
        count += 1


def _filled(
    order: Sequence[int], cost: Mapping[int, int], *, count: int, ranks: int, size: int
) -> tuple[np.ndarray, Rounds]:
    """Return the costs, `[count, ranks]`, and the rounds.

    In all rounds but the last each example goes to the fullest micro-batch in which it fits (best fit), so
    that they are equally full although some have a single long example. The last one gets the rest, by least
    load.
    """
    bins = (count - 1) * ranks
    kept = min(ranks, max(0, len(order) - bins))
    full, rest = _best_fit(order, cost, bins, size)
    if len(rest) < kept:  # leave no micro-batch of the last round empty
        full, rest = _best_fit(order[:-kept], cost, bins, size)
        rest += order[-kept:]
    rounds = _cut(_heaviest_first(full, cost), ranks)
    rounds.append(_least_load(rest, cost, ranks, most=len(order)))
    costs = [[sum(cost[index] for index in micro) for micro in micros] for micros in rounds]
    return np.array(costs), rounds


def _best_fit(
    order: Sequence[int], cost: Mapping[int, int], bins: int, size: int
) -> tuple[list[list[int]], list[int]]:
    """Return bins of at most `size`, and the examples that fit in none."""
    found: list[list[int]] = [[] for _ in range(bins)]
    by_load = [(0, number) for number in range(bins)]  # sorted
    rest = []
    for index in order:
        place = bisect.bisect_left(by_load, (size - cost[index] + 1, 0)) - 1
        if place < 0:
            rest.append(index)
            continue
        load, number = by_load.pop(place)
        found[number].append(index)
        bisect.insort(by_load, (load + cost[index], number))
    return found, rest


class _PaddedBins:
    def __init__(self, bins: int) -> None:
        self.items: list[list[int]] = [[] for _ in range(bins)]
        self.rows = np.zeros(bins, dtype=np.int64)
        self.lengths = np.zeros(bins, dtype=np.int64)

    def costs_with(self, rows: int = 0, length: int = 0) -> np.ndarray:
        return (self.rows + rows) * np.maximum(self.lengths, length)

    def add(self, place: np.integer, index: int, rows: int, length: int) -> None:
        self.items[place].append(index)
        self.rows[place] += rows
        self.lengths[place] = max(self.lengths[place], length)


def _rounds_of_rows(shape: Shape, budget: int, ranks: int) -> Rounds:
    """Return rounds of `ranks` micro-batches of padded rows: those of first fit, evened out if they fit."""
    order = sorted(shape, key=lambda index: (-shape[index][1], -shape[index][0], index))
    bins = _PaddedBins(-(-len(order) // ranks) * ranks)
    for index in order:
        fits = (bins.costs_with(*shape[index]) <= budget) | (bins.rows == 0)
        bins.add(fits.argmax(), index, *shape[index])
    count = -(-int((bins.rows > 0).sum()) // ranks) * ranks
    even = _PaddedBins(count)
    for index in order:
        even.add(even.costs_with(*shape[index]).argmin(), index, *shape[index])
    alone = np.array([len(items) == 1 for items in even.items])
    if ((even.costs_with() <= budget) | alone).all():
        bins = even
    by_cost = np.argsort(-bins.costs_with(), kind="stable")[:count]
    return _cut([bins.items[place] for place in by_cost], ranks)
