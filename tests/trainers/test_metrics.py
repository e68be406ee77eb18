"""Sums between two log lines."""

from __future__ import annotations

import pytest
import torch

from rpo_trainer.trainers.metrics import MetricSums


def test_means_are_over_examples_and_not_over_batches():
    sums = MetricSums()
    sums.add("x", torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    sums.add("x", torch.tensor([10.0]), torch.ones(1))
    assert sums.drain() == {"x": 4.0}
    assert sums.drain() == {}


def test_weights_count_and_a_weight_of_zero_is_no_example():
    sums = MetricSums()
    sums.add("x", torch.tensor([1.0, 100.0]), torch.tensor([1.0, 0.0]))
    sums.add("never", torch.tensor([5.0]), torch.zeros(1))
    assert sums.drain() == {"x": 1.0}


def test_ratios_are_divided_at_the_end():
    sums = MetricSums()
    sums.add_ratio("nll", torch.tensor(10.0), torch.tensor(4.0))
    sums.add_ratio("nll", torch.tensor(2.0), torch.tensor(2.0))
    assert sums.drain() == {"nll": 2.0}


def test_sums_are_kept_in_double_precision_and_without_graph():
    sums = MetricSums()
    values = torch.full((1000,), 0.1, requires_grad=True)
    for _ in range(100):
        sums.add("x", values, torch.ones(1000))
    mean = sums.drain()["x"]
    assert mean == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)
    assert values.grad is None


def test_ranks_are_joined_in_one_reduction_of_sorted_names():
    calls = []

    def two_ranks(sums: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(sums.shape))
        return sums + torch.tensor([[7.0, 1.0], [30.0, 2.0]])  # the other rank's values

    sums = MetricSums()
    sums.add("b", torch.tensor([1.0, 2.0]), torch.ones(2))
    sums.add("a", torch.tensor([3.0]), torch.ones(1))
    assert sums.drain(two_ranks) == {"a": 5.0, "b": 33.0 / 4.0}
    assert calls == [(2, 2)]
