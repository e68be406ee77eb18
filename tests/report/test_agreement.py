"""Reward stages in the report: metrics, texts and plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.html import render
from rpo_trainer.report.scores import read_agreement
from rpo_trainer.report.stage_plots import stage_plots
from rpo_trainer.report.verdict import judge
from rpo_trainer.stages.record import EvaluationRecord
from tests.report.conftest import about, cells

Stage = dict[str, Any]

PAIRS: Stage = {
    "accuracy": 0.9,
    "pearson/gap": 0.5,
    "calibration/pairs": 0.05,
    "calibration": {"pairs": [
        {"predicted": 0.6, "observed": 0.7, "count": 50}, {"predicted": 0.9, "observed": 1.0, "count": 50},
    ]},
}  # fmt: skip
RATED: Stage = {
    "pearson/wit": -0.25, "spearman/wit": 0.1, "pearson/reward": 0.75,
    "calibration": {"wit": [{"predicted": 1.0, "observed": 2.0, "count": 5}]},
}  # fmt: skip


def test_figures_are_read() -> None:
    found = read_agreement(EvaluationRecord.from_json(PAIRS))
    assert found.accuracy is not None and found.accuracy.value == 0.9
    assert found.accuracy.low == pytest.approx(0.8256, abs=1e-4)  # Wilson, 100 pairs
    assert found.correlation() == 0.5
    assert found.calibration == {"pairs": [(0.6, 0.7), (0.9, 1.0)]}
    rated = read_agreement(EvaluationRecord.from_json(RATED))
    assert rated.accuracy is None and rated.correlation() == 0.75
    assert rated.correlations == {"wit": -0.25, "reward": 0.75}


@pytest.mark.parametrize(
    "record",
    [{}, {"pearson/wit": "high", "accuracy": math.nan, "calibration": [1]},
     {"calibration": {"wit": [{"predicted": None}, 3], "pairs": None}}],
)  # fmt: skip
def test_what_is_no_figure_is_left_out(record: Stage) -> None:
    found = read_agreement(EvaluationRecord.from_json(record, lenient=True))
    assert (found.accuracy, found.correlation(), found.calibration) == (None, None, {})


@pytest.fixture
def make_reward_run(
    make_run: Callable[..., Path], make_stage: Callable[..., Stage]
) -> Callable[[Stage], Path]:
    def make(evaluation: Stage) -> Path:
        rows = [
            {"stage": "rm", "step": s, "loss": 0.7 - s / 100, "loss/bradley_terry": 0.7 - s / 100,
             "rewards/margins": s / 10, "accuracy": 0.8}
            for s in range(1, 11)
        ]  # fmt: skip
        rows += [
            {"stage": "rm", "step": s, "eval_loss": e} for s, e in ((0, 0.7), (5, 0.3), (10, 0.5))
        ]
        stages = [
            make_stage("sft", "sft", init="model"),
            make_stage("rm", "reward", eval=evaluation),
        ]
        return make_run(stages=stages, metrics=rows)

    return make


def test_words_table_and_plots_of_pairs(make_reward_run: Callable[[Stage], Path]) -> None:
    run = collect_run(make_reward_run(PAIRS))
    accuracy, correlation = (
        about(run, "rm", "reward-accuracy"),
        about(run, "rm", "reward-correlation"),
    )
    assert accuracy.level == "good" and "90.0%" in accuracy.text
    assert correlation.level == "info" and "gap 0.50." in correlation.text
    overfitting = about(run, "rm", "overfitting")
    assert overfitting.level == "warn" and "step 5 (0.300)" in overfitting.text
    assert not [f for f in judge(run).of_stage("rm") if "NLL" in f.text]
    texts = {key: [cell.text for cell in column] for key, column in cells(run).items()}
    assert texts["reward_accuracy"] == ["–", "0.900"]
    assert texts["correlation"] == ["–", "0.500"]
    assert "nll" not in texts
    plots = stage_plots(run.stages[1])
    assert {"rm-calibration-pairs", "rm-accuracy"} <= {plot.key for plot in plots}
    page = render(run, Path("run"))
    assert all(plot.svg in page for plot in plots)


def test_words_of_ratings_and_of_chance(make_reward_run: Callable[[Stage], Path]) -> None:
    run = collect_run(make_reward_run({**RATED, "accuracy": 0.5, "pearson/reward": -0.5}))
    correlation = about(run, "rm", "reward-correlation")
    assert correlation.level == "bad" and "wit −0.25, reward −0.50." in correlation.text
    chance = about(run, "rm", "reward-accuracy")
    assert chance.level == "bad" and chance.advice


def test_without_held_out_rows_it_says_so(make_reward_run: Callable[[Stage], Path]) -> None:
    finding = about(collect_run(make_reward_run({})), "rm", "agreement-unknown")
    assert finding.level == "info" and "eval_fraction" in str(finding.advice)


def test_the_kind_is_known_from_metrics_alone(make_reward_run: Callable[[Stage], Path]) -> None:
    run = make_reward_run(PAIRS)
    (run / "chain.json").unlink()
    assert [stage.kind for stage in collect_run(run).stages] == ["reward"]
