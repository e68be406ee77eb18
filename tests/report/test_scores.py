from __future__ import annotations

import math

import pytest

from rpo_trainer.report.scores import Measure, read_scores
from rpo_trainer.stages.record import EvaluationRecord


def test_figures_and_bounds_are_read() -> None:
    scores = read_scores(
        EvaluationRecord(
            prompts=100,
            reward_mean=3.5,
            reward_low=3.25,
            reward_high=3.75,
            greedy_reward_mean=4.0,
            exact=0.5,
            nll=2.0,
        )
    )
    assert scores.reward_sampled == Measure(3.5, 3.25, 3.75)
    assert scores.reward_greedy == Measure(4.0)
    assert scores.nll == Measure(2.0)
    assert scores.exact_greedy is None
    assert scores.main() == ("reward_sampled", scores.reward_sampled)


def test_share_has_wilsons_interval() -> None:
    # The bounds are the two p with |p_hat - p| = z sqrt(p (1 - p) / n).
    exact = read_scores(EvaluationRecord(prompts=80, exact=0.3)).exact_sampled
    assert exact is not None
    for bound in (exact.low, exact.high):
        assert bound is not None
        assert abs(0.3 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 80))


def test_share_of_all_stays_within_one() -> None:
    exact = read_scores(EvaluationRecord(prompts=10, exact=1.0)).exact_sampled
    assert exact is not None
    assert exact.high is not None
    assert exact.high == pytest.approx(1.0)
    assert exact.high <= 1.0
    assert exact.low is not None
    assert 0.6 < exact.low < 0.8


def test_an_empty_record_has_no_figures() -> None:
    assert read_scores(EvaluationRecord()).main() is None
    record = {"reward_mean": None, "exact": float("nan")}
    assert read_scores(EvaluationRecord.from_json(record, lenient=True)).main() is None


def test_overlap_needs_both_intervals() -> None:
    assert Measure(1.0, 0.5, 1.5).overlaps(Measure(2.0, 1.5, 2.5))
    assert not Measure(1.0, 0.5, 1.4).overlaps(Measure(2.0, 1.5, 2.5))
    assert not Measure(1.0).overlaps(Measure(1.0, 0.0, 2.0))
