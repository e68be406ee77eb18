"""Losses of reward models compared with closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from rpo_trainer.trainers.reward_losses import bradley_terry_loss, regression_losses


@pytest.mark.parametrize("margin", [None, 0.0, 0.5, 2.0])
def test_bradley_terry_is_minus_log_sigmoid_of_the_gap_less_the_margin(margin):
    chosen = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    rejected = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
    margins = None if margin is None else torch.full((3,), margin, dtype=torch.float64)
    found = bradley_terry_loss(chosen, rejected, margins)
    expected = [
        -math.log(1 / (1 + math.exp(-(c - r - (margin or 0.0)))))
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_bradley_terry_of_equal_rewards_is_ln_2_and_its_slope_a_half():
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bradley_terry_keeps_its_tails(dtype):
    gap = torch.tensor([-80.0, 80.0], dtype=dtype)
    wrong, right = bradley_terry_loss(gap, torch.zeros_like(gap)).tolist()
    assert wrong == pytest.approx(80.0)
    assert right == pytest.approx(math.exp(-80), rel=1e-6)


def test_regression_is_the_squared_error_where_there_is_a_rating():
    nan = float("nan")
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    ratings = torch.tensor([[0.0, nan], [nan, 4.5]])
    found = regression_losses(scores, ratings)
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.25]]
    found.sum().backward()
    assert scores.grad.tolist() == [[2.0, 0.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (bradley_terry_loss, ((3,), (2,)), r"rejected is \[2\], chosen \[3\]"),
        (bradley_terry_loss, ((3,), (3,), (1,)), r"margin is \[1\], chosen \[3\]"),
        (regression_losses, ((2, 3), (2, 1)), r"ratings are \[2, 1\], scores \[2, 3\]"),
    ],
)
def test_shapes_that_do_not_agree(loss, shapes, message):
    with pytest.raises(ValueError, match=message):
        loss(*map(torch.zeros, shapes))
