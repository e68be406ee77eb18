"""Dealing by least load: complete, within its limits, close to the mean of the ranks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo_trainer.step.dealing import deal, deal_within, idle_share, loads, micro_batches
from rpo_trainer.step.order import StepBatchSampler, TokenBudgetSampler

LENGTHS = Path(__file__).parents[2] / "benchmarks" / "ultrafeedback.csv"


def packed(lengths):
    return [(n, 1) for n in lengths]


def flat(dealt):
    return sorted(i for rank in dealt for micro in rank for i in micro)


def test_idle_share_by_hand():
    step = np.array([[4, 1], [2, 3]])  # two ranks, two micro-batches
    assert idle_share([step], each_micro_batch=False) == 0  # both have 5
    assert idle_share([step], each_micro_batch=True) == 1 - 10 / (2 * (4 + 3))
    assert idle_share([step, np.array([[6], [0]])], each_micro_batch=False) == 1 - 16 / (2 * 11)
    assert idle_share([], each_micro_batch=True) == 0


def test_the_longest_go_to_the_least_load():
    # 7 and 6 first, then 5 to the rank of 6; 4 and 3 to that of 7, and 2 to the only one not full.
    assert deal(range(6), [7, 6, 5, 4, 3, 2], ranks=2, most=3) == [[[0, 3, 4]], [[1, 2, 5]]]
    # The same ranks; each has two micro-batches, the most expensive first.
    assert deal(range(6), [7, 6, 5, 4, 3, 2], ranks=2, most=2) == [[[0], [3, 4]], [[2, 5], [1]]]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("examples", [60, 61, 7, 1])
def test_numbers_are_limited_and_equal_in_a_full_batch(examples, ranks, most):
    costs = np.random.default_rng(0).integers(10, 2000, size=100)
    batch = list(range(20, 20 + examples))
    dealt = deal(batch, costs, ranks=ranks, most=most)
    assert flat(dealt) == batch
    forwards = micro_batches(examples, ranks, most)
    assert [len(rank) for rank in dealt] == [forwards] * ranks
    numbers = {len(micro) for rank in dealt for micro in rank}
    assert max(numbers) <= most
    if examples == forwards * ranks * most:
        assert numbers == {most}
    for rank in loads(dealt, np.stack([costs, np.ones_like(costs)], 1)).tolist():
        assert rank == sorted(rank, reverse=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("examples", [64, 61, 2, 1])
def test_micro_batches_within_a_budget(examples, ranks, padded):
    lengths = np.random.default_rng(examples).integers(10, 1500, size=64).tolist()
    shapes = [(2 + n % 3, n) if padded else (n, 1) for n in lengths]
    budget = 4096
    dealt = deal_within(range(examples), shapes, budget, ranks=ranks)
    assert flat(dealt) == list(range(examples))
    costs = loads(dealt, shapes)  # an array: the same number for each rank
    for rank, row in zip(dealt, costs, strict=True):
        for micro, cost in zip(rank, row, strict=True):
            assert cost == sum(shapes[i][0] for i in micro) * max(
                (shapes[i][1] for i in micro), default=0
            )
            assert cost <= budget or len(micro) == 1
    if examples > 60 and not padded:
        assert all(micro for rank in dealt for micro in rank)
        assert costs.shape[1] == -(-costs.sum() // (budget * ranks))
        assert idle_share([costs], each_micro_batch=True) < 0.02
        assert idle_share([costs], each_micro_batch=False) < 0.01


def test_micro_batches_are_evened_out():
    dealt = deal_within(range(5), packed([6, 4, 4, 3, 3]), 16, ranks=1)
    assert sorted(loads(dealt, packed([6, 4, 4, 3, 3]))[0]) == [10, 10]  # first fit: 16 and 4


def test_a_long_example_alone_is_matched_by_full_micro_batches():
    lengths = [100, 50, 50, 60, 40, 5, 5, 5]
    dealt = deal_within(range(8), packed(lengths), 100, ranks=3)
    assert loads(dealt, packed(lengths)).tolist() == [[100, 5]] * 3


def test_a_round_without_examples_for_all_ranks_is_avoided():
    lengths = [50] * 6 + [10, 10]  # a budget of 100 is full after the six
    dealt = deal_within(range(8), packed(lengths), 100, ranks=3)
    assert all(micro for rank in dealt for micro in rank)


def test_padded_micro_batches_hold_examples_of_like_length():
    shapes = [(1, n) for n in (100, 10, 100, 10, 10, 10)]
    (rank,) = deal_within(range(6), shapes, 200, ranks=1)
    assert sorted(map(sorted, rank)) == [[0, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize("padded", [False, True])
def test_examples_beyond_the_budget_are_alone(padded):
    shapes = [(1, n) if padded else (n, 1) for n in (3, 50, 4, 60)]
    (rank,) = deal_within(range(4), shapes, 10, ranks=1)
    assert sorted(map(sorted, rank)) == [[0, 2], [1], [3]]


@pytest.fixture(scope="module")
def ultrafeedback() -> list[int]:
    """Tokens of pairs, each prompt once; each pair 28 times, so that there are 100 steps of 256."""
    with LENGTHS.open() as file:
        return [sum(int(n) for n in row.values()) for row in csv.DictReader(file)] * 28


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_wait_at_most_four_percent_of_the_time(micro, ranks, ultrafeedback):
    """By number if ranks wait once per step, by tokens if they wait in each micro-batch: the defaults."""
    common: dict[str, Any] = {"global_batch_size": 256, "world_size": ranks}
    by_number = StepBatchSampler(ultrafeedback, micro_batch_size=micro, **common)
    once = list(by_number.loads(20))
    assert idle_share(once, each_micro_batch=False) < 0.04
    budget = max(*(int(costs.max()) for costs in once), *ultrafeedback)
    by_tokens = TokenBudgetSampler(ultrafeedback, budget=budget, micro_batch_size=micro, **common)
    each = list(by_tokens.loads(20))
    assert idle_share(each, each_micro_batch=True) < 0.04
    for mine, other in zip(each, once, strict=True):
        assert mine.sum() == other.sum()
        assert mine.shape[1] <= other.shape[1] and mine.max() <= budget
