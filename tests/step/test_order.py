"""Data order: a pure function, balanced, complete."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rpo_trainer.step.order import (
    StepBatchSampler,
    TokenBudgetSampler,
    deal,
    deal_within,
    epoch_order,
)


def test_order_depends_on_seed_and_epoch_alone():
    assert (epoch_order(50, 1, 0) == epoch_order(50, 1, 0)).all()
    assert (epoch_order(50, 1, 0) != epoch_order(50, 1, 1)).any()
    assert (epoch_order(50, 1, 0) != epoch_order(50, 2, 0)).any()
    assert sorted(epoch_order(50, 3, 4)) == list(range(50))
    # Pinned: a new version must not change the order of an unfinished run.
    assert epoch_order(8, 0, 0).tolist() == PINNED


PINNED = [3, 6, 4, 0, 7, 5, 2, 1]


def test_deal_is_balanced_in_count_and_cost():
    costs = np.random.default_rng(0).integers(10, 2000, size=64).tolist()
    bins = deal(range(64), costs, 8)
    assert [len(b) for b in bins] == [8] * 8
    assert sorted(i for b in bins for i in b) == list(range(64))
    loads = [sum(costs[i] for i in b) for b in bins]
    naive = [sum(costs[i] for i in range(s, s + 8)) for s in range(0, 64, 8)]
    assert max(loads) - min(loads) < (max(naive) - min(naive)) / 4


def test_snake_order_by_hand():
    assert deal([0, 1, 2, 3, 4], [5, 4, 3, 2, 1], 2) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("examples", [24, 25, 31, 5])
def test_ranks_together_see_each_example_once_in_the_same_steps(world, examples):
    costs = list(range(examples))
    common = {"global_batch_size": 12, "micro_batch_size": 2, "seed": 7}
    whole = StepBatchSampler(costs, **common)
    ranks = [StepBatchSampler(costs, **common, world_size=world, rank=r) for r in range(world)]
    lists = [list(sampler) for sampler in ranks]
    assert len({len(micro) for micro in lists}) == 1
    assert all(len(micro) == len(sampler) for micro, sampler in zip(lists, ranks, strict=True))
    seen = sorted(i for micro in lists for batch in micro for i in batch)
    assert seen == list(range(examples))
    first_step = 12 // (2 * world) if examples >= 12 else None
    dealt = sorted(i for micro in lists for batch in micro[:first_step] for i in batch)
    assert dealt == sorted(whole.global_batches()[0])
    assert max(len(batch) for micro in lists for batch in micro) <= 2


def test_epochs_differ_and_drop_last():
    sampler = StepBatchSampler([1] * 10, global_batch_size=4, micro_batch_size=4, drop_last=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and len(first) == len(sampler) == 2


def test_evaluation_order_is_longest_first():
    sampler = StepBatchSampler(
        [3, 9, 1, 7], global_batch_size=2, micro_batch_size=2, order="longest"
    )
    assert list(sampler) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("budget", [None, 12])
def test_the_order_of_the_data_is_kept_from_step_to_step(world, budget):
    costs = [3, 9, 1, 7, 5, 5, 8]
    common = {"global_batch_size": 2, "world_size": world, "order": "data"}
    ranks: list[Any] = [
        StepBatchSampler(costs, micro_batch_size=1, rank=rank, **common)
        if budget is None
        else TokenBudgetSampler([(c, 1) for c in costs], budget=budget, rank=rank, **common)
        for rank in range(world)
    ]
    assert ranks[0].global_batches() == [[0, 1], [2, 3], [4, 5], [6]]
    ranks[0].set_epoch(1)
    assert ranks[0].global_batches() == [[0, 1], [2, 3], [4, 5], [6]]
    if budget is None and world == 1:
        assert list(ranks[0])[:4] == [[1], [0], [3], [2]]  # dealt by length within a step


def cost(items, shapes):
    return sum(shapes[i][0] for i in items) * max((shapes[i][1] for i in items), default=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("examples", [64, 61, 2, 1])
def test_bins_within_a_budget(examples, ranks, padded):
    lengths = np.random.default_rng(examples).integers(10, 1500, size=64).tolist()
    shapes = [(2 + n % 3, n) if padded else (n, 1) for n in lengths]
    budget = 4096
    bins = deal_within(range(examples), shapes, budget, ranks)
    assert sorted(i for b in bins for i in b) == list(range(examples))
    assert len(bins) % ranks == 0
    costs = [cost(b, shapes) for b in bins]
    assert costs == sorted(costs, reverse=True)
    for b, c in zip(bins, costs, strict=True):
        assert c <= budget or len(b) == 1
    if examples > 60 and not padded:
        needed = -(-sum(costs) // budget)
        assert len(bins) <= 1.1 * needed + ranks
        # Rank r runs bins r, r + ranks, ...: in each round all of them together.
        rounds = [costs[start : start + ranks] for start in range(0, len(costs), ranks)]
        assert sum(max(r) - min(r) for r in rounds) < 0.05 * sum(costs)


def test_bins_are_evened_out():
    shapes = [(n, 1) for n in (6, 4, 4, 3, 3)]
    costs = sorted(cost(b, shapes) for b in deal_within(range(5), shapes, 16))
    assert costs == [9, 11]  # first fit alone: 16 and 4


def test_padded_bins_hold_examples_of_like_length():
    shapes = [(1, n) for n in (100, 10, 100, 10, 10, 10)]
    assert sorted(map(sorted, deal_within(range(6), shapes, 200))) == [[0, 2], [1, 3, 4, 5]]


def test_examples_beyond_the_budget_are_alone():
    shapes = [(n, 1) for n in (3, 50, 4, 60)]
    assert deal_within(range(4), shapes, 10) == [[3], [1], [2, 0]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_budgeted_steps_are_the_global_batches_on_every_rank(world, drop_last):
    lengths = np.random.default_rng(0).integers(1, 100, size=31).tolist()
    common = {"global_batch_size": 12, "seed": 7, "drop_last": drop_last}
    whole = StepBatchSampler(lengths, micro_batch_size=1, **common)
    shapes = [(n, 1) for n in lengths]
    ranks = [
        TokenBudgetSampler(shapes, budget=120, world_size=world, rank=r, **common)
        for r in range(world)
    ]
    for epoch in (0, 1):
        for sampler in (whole, *ranks):
            sampler.set_epoch(epoch)
        steps = list(zip(*ranks, strict=True))
        assert len(steps) == len(ranks[0]) == (2 if drop_last else 3)
        assert len({len(step[0]) for step in steps}) > 1 or drop_last
        for step, batch in zip(steps, whole.global_batches(), strict=True):
            assert len({len(micro) for micro in step}) == 1
            assert sorted(i for micro in step for b in micro for i in b) == sorted(batch)
