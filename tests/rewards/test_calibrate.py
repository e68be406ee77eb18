"""η: fitted to labels, fitted to gaps, and its effect on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rpo_trainer.errors import DataError
from rpo_trainer.rewards.calibrate import by_source, calibrate, fit_reward_scale
from tests.raising import raises


def labeled(eta: float, pairs: int, seed: int, spread: float = 1.5) -> list[float]:
    """Gaps of chosen less rejected, chosen with the probability σ(η · gap)."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(0, spread / eta, pairs)
    kept = rng.random(pairs) < 1 / (1 + np.exp(-eta * gaps))
    return [float(g) for g in np.where(kept, gaps, -gaps)]


@pytest.mark.parametrize("eta", [0.03, 0.5, 1.0, 4.0, 250.0])
@pytest.mark.parametrize("seed", range(3))
def test_data_made_with_a_known_eta_give_it_back(eta: float, seed: int) -> None:
    fit = fit_reward_scale(labeled(eta, 20_000, seed))
    assert fit.method == "labels"
    assert fit.reward_scale == pytest.approx(eta, rel=0.05)


def test_the_fit_is_where_the_likelihood_is_largest() -> None:
    gaps = np.array(labeled(0.7, 500, 1))

    def likelihood(eta: float) -> float:
        return float(-np.log1p(np.exp(-eta * gaps)).sum())

    best = fit_reward_scale(list(gaps)).reward_scale
    assert likelihood(best) > max(likelihood(best * 0.99), likelihood(best * 1.01))


def test_a_closed_form() -> None:
    # Of equal gaps a share p agrees: σ(η g) = p.
    fit = fit_reward_scale([2.0] * 30 + [-2.0] * 10)
    assert fit.reward_scale == pytest.approx(math.log(3) / 2, rel=1e-3)
    assert (fit.pairs, fit.against) == (40, 10)


def test_without_disagreement_the_median_gap_gets_its_target() -> None:
    fit = fit_reward_scale([0.0, 0.0, 1.0, 2.0, 3.0])
    assert fit.method == "quantile"
    assert 1 / (1 + math.exp(-fit.reward_scale * 2.0)) == pytest.approx(0.9, abs=1e-3)
    assert fit_reward_scale([-1.0, 2.0, 3.0], labeled=False).method == "quantile"
    assert "the median of 3 gaps" in fit.line()


def test_units_do_not_matter() -> None:
    gaps = labeled(1.3, 2000, 4)
    for found in (gaps, [abs(gap) for gap in gaps]):
        one = fit_reward_scale(found).reward_scale
        assert fit_reward_scale([100 * g for g in found]).reward_scale == pytest.approx(one / 100)


@pytest.mark.parametrize(
    ("gaps", "code"),
    [
        ([], "rewards.no-gaps"),
        ([0.0, 0.0], "rewards.no-gaps"),
        ([-1.0, -2.0, 1.0], "rewards.contradict-labels"),
    ],
)
def test_what_cannot_be_fitted(gaps: list[float], code: str) -> None:
    with raises(code, DataError) as error:
        fit_reward_scale(gaps)
    if code == "rewards.no-gaps":
        assert error.value.details == {"gaps": len(gaps)}


def row(*rewards: float, source: str = "s") -> dict[str, Any]:
    return {"id": "r", "source": source, "rewards": list(rewards)}


def test_shares_of_targets() -> None:
    rows = [row(10.0, 0.0), row(1.0, 0.0), row(0.01, 0.0), row(0.0, 0.0)]
    found = calibrate(rows, 1.0)
    assert (found.rows, found.ties, found.against) == (4, 1, 0)
    assert (found.saturated, found.flat) == (0.25, 0.5)
    assert found.warning() is None
    assert sum(count for _, _, count in found.histogram) == 4
    assert found.histogram[0][0] == 0.0 and found.histogram[-1][1] == 10.0
    assert "saturated" in str(calibrate(rows, 1000.0).warning())
    assert "1/2" in str(calibrate(rows, 0.001).warning())


def test_by_source_at_one_eta() -> None:
    rows = [row(2.0, 0.0, source="a"), row(200.0, 0.0, source="b"), row(100.0, 0.0, source="b")]
    rows.append({"id": "bare", "source": "c", "rewards": None})
    found = by_source(rows)
    assert list(found) == ["all", "a", "b"]
    assert [c.without for c in found.values()] == [1, 0, 0]
    assert found["all"].fit is not None
    assert {c.reward_scale for c in found.values()} == {found["all"].fit.reward_scale}
    assert found["a"].flat == 1.0 and found["a"].fit is not None
    assert found["a"].fit.reward_scale == pytest.approx(math.log(9) / 2, rel=1e-3)
    assert list(by_source(rows[:1])) == ["all"]


def test_no_fit_is_reported_and_no_rewards_are_an_error() -> None:
    found = calibrate([row(1.0, 1.0)])
    assert found.fit is None and found.unfit is not None and " 0: η" in found.unfit
    assert found.reward_scale == 1.0
    with raises("data.missing-rewards", DataError):
        calibrate([{"id": "x", "source": "s", "rewards": None}])
