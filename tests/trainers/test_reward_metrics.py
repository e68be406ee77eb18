"""Agreement of a reward model with held-out rows, on numbers small enough to compute by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rpo_trainer.trainers.reward_metrics import (
    calibration_error,
    calibration_table,
    pair_metrics,
    pearson,
    rating_metrics,
    spearman,
)

NAN = float("nan")


def test_pearson_of_a_line_and_of_what_is_constant():
    x = np.array([1.0, 2.0, 4.0])
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1.0)
    assert pearson(x, np.ones(3)) is None
    assert pearson(x[:1], x[:1]) is None
    # Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²) by hand: 1 / √(2 · 2)
    assert pearson(np.array([0.0, 1, 2]), np.array([0.0, 2, 1])) == pytest.approx(0.5)


def test_spearman_sees_the_order_alone_and_gives_ties_their_mean_rank():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert pearson(x, np.exp(x)) < 0.95
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    tied = np.array([0.0, 5.0, 5.0, 9.0])
    assert spearman(x, tied) == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_calibration_bins_are_of_equal_count_by_prediction():
    predicted = np.arange(20.0)[::-1]
    table = calibration_table(predicted, predicted + 0.5)
    assert [row["count"] for row in table] == [5, 5, 5, 5]
    assert [row["predicted"] for row in table] == [2, 7, 12, 17]
    assert [row["observed"] for row in table] == [2.5, 7.5, 12.5, 17.5]
    assert calibration_error(table) == pytest.approx(0.5)
    assert len(calibration_table(np.zeros(3), np.zeros(3))) == 1
    assert len(calibration_table(np.zeros(999), np.zeros(999))) == 10


def test_pairs():
    gaps = np.array([1.0, 2.0, -1.0, 0.0])
    metrics, tables = pair_metrics(gaps, np.array([1.0, 2.0, -1.0, 0.0]) * 3)
    assert metrics["accuracy"] == 0.5  # a gap of 0 is no preference
    assert metrics["pearson/gap"] == pytest.approx(1.0)
    sure = [1 / (1 + math.exp(-abs(gap))) for gap in gaps]
    (row,) = tables["pairs"]
    assert row["predicted"] == pytest.approx(sum(sure) / 4) and row["observed"] == 0.5
    assert metrics["calibration/pairs"] == pytest.approx(sum(sure) / 4 - 0.5)
    assert set(pair_metrics(gaps, None)[0]) == {"accuracy", "calibration/pairs"}


def test_ratings_by_attribute_and_as_one_reward():
    scores = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    ratings = np.array([[2.0, 1.0], [3.0, NAN], [4.0, 1.0], [5.0, 2.0]])
    metrics, tables = rating_metrics(
        scores, ratings, ["a", "b"], np.array([1.0, -1.0]), ["p", "p", "p", "q"]
    )
    assert metrics["bias/a"] == pytest.approx((6 - 14) / 4)
    assert metrics["rmse/a"] == pytest.approx(math.sqrt((1 + 1 + 1 + 25) / 4))
    assert metrics["rmse/b"] == pytest.approx(math.sqrt((1 + 9 + 4) / 3))
    # Rewards: predicted 1, (2), −1, 0; rated 1, –, 3, 3. Only rows 0 and 2 of p are complete: 1 > −1, 1 < 3.
    assert metrics["accuracy"] == 0.0
    assert metrics["bias/reward"] == pytest.approx((0 - 7) / 3)
    assert set(tables) == {"a", "b", "reward"}


def test_an_attribute_of_weight_0_is_not_needed_for_the_reward():
    scores, ratings = np.array([[1.0, 9.0], [2.0, 9.0]]), np.array([[1.0, NAN], [3.0, NAN]])
    metrics, _ = rating_metrics(scores, ratings, ["a", "b"], np.array([1.0, 0.0]), ["p", "p"])
    assert metrics["accuracy"] == 1.0 and metrics["rmse/reward"] == metrics["rmse/a"]
    assert not [name for name in metrics if name.endswith("/b")]


def test_one_attribute_is_the_reward_and_without_pairs_there_is_no_accuracy():
    metrics, tables = rating_metrics(
        np.array([[1.0], [2.0]]), np.array([[1.0], [1.0]]), ["score"], np.ones(1), ["p", "q"]
    )
    assert set(metrics) == {"rmse/score", "bias/score", "calibration/score"}
    assert set(tables) == {"score"}
