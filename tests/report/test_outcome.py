from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.scores import MAIN_FIGURES
from rpo_trainer.report.table import comparison
from rpo_trainer.report.verdict import judge
from tests.report.conftest import about

Make = Callable[..., Any]


def test_a_change_within_the_intervals_is_called_noise(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval=make_evaluation(3.0, half_width=0.2)),
        make_stage("dpo", "dpo", eval=make_evaluation(3.1, half_width=0.2)),
    ]
    run = collect_run(make_run(stages=stages))
    assert about(run, "dpo", "figure-unclear").level == "info"
    headline = judge(run).headline
    assert "changed from 3.00 after sft to 3.10 after dpo (+0.10)." in headline
    assert "rose" not in headline and "fell" not in headline


def test_a_reward_that_fell_is_bad(make_run: Make, make_stage: Make, make_evaluation: Make) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval=make_evaluation(3.0)),
        make_stage("dpo", "dpo", eval=make_evaluation(2.0)),
    ]
    run = collect_run(make_run(stages=stages))
    finding = about(run, "dpo", "figure-fell")
    assert finding.level == "bad" and "3.00 to 2.00 (−1.00 relative to sft)" in finding.text


def test_a_win_rate_is_judged_by_its_interval(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    def found(low: float, high: float) -> tuple[str, str]:
        wins = {"value": (low + high) / 2, "low": low, "high": high}
        scored = {**make_evaluation(3.0), "baseline": "sft", "win_rate": wins}
        chain = json.loads((run_dir / "chain.json").read_text())
        chain["stages"] = [make_stage("dpo", "dpo", eval=scored)]
        (run_dir / "chain.json").write_text(json.dumps(chain))
        findings = judge(collect_run(run_dir)).of_stage("dpo")
        (finding,) = [f for f in findings if f.key.startswith(("wins", "loses"))]
        assert f"{low:.0%} to {high:.0%}" in finding.text and "sft" in finding.text
        return finding.key, finding.level

    run_dir = make_run()
    assert [found(0.55, 0.65), found(0.3, 0.4), found(0.4, 0.6)] == [
        ("wins", "good"),
        ("loses", "bad"),
        ("wins-unclear", "info"),
    ]


def test_small_falls_one_behind_the_other_are_no_noise(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    rewards = {"sft": 2.68, "dpo": 3.44, "rpo-1": 3.42, "rpo-2": 3.38, "rpo-3": 3.27}
    before = ["model", *rewards]
    stages = [
        make_stage(name, name[:3], init=init, eval=make_evaluation(reward))
        for (name, reward), init in zip(rewards.items(), before, strict=False)
    ]
    run = collect_run(make_run(stages=stages, metrics=[]))
    finding = about(run, "rpo-3", "figure-keeps-falling")
    assert MAIN_FIGURES["reward_sampled"] in finding.text.lower() and "last 3" in finding.text
    assert finding.text.endswith("3.44, 3.42, 3.38, 3.27.") and finding.level == "warn"
    assert finding.advice is not None and "dpo." in finding.advice
    assert not [f for f in judge(run).of_stage("rpo-2") if f.key == "figure-keeps-falling"]
    headline = judge(run).headline
    assert "to 3.27 after rpo-3 (+0.59)." in headline and "after dpo: 3.44." in headline


def test_a_chain_that_begins_with_preferences_is_compared_with_its_model(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    def scored(reward: float) -> dict[str, Any]:
        return {
            **make_evaluation(reward), "baseline": "model", "of_baseline": make_evaluation(2.0)
        }  # fmt: skip

    stages = [
        make_stage("dpo", "dpo", init="model", eval=scored(3.0)),
        make_stage("rpo", "rpo", init="dpo", eval=scored(4.0)),
    ]
    run = collect_run(make_run(stages=stages, metrics=[]))
    rose = about(run, "dpo", "figure-rose")
    assert rose.level == "good" and "2.00 to 3.00 (+1.00" in rose.text and "sft" not in rose.text
    rose = about(run, "rpo", "figure-rose")
    assert rose.level == "good" and "3.00 to 4.00 (+1.00 relative to dpo)" in rose.text
    headline = judge(run).headline
    assert "rose from 2.00" in headline and "to 4.00 after rpo (+2.00)." in headline


def test_a_baseline_that_seeded_nothing_is_no_start(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    scored = {**make_evaluation(3.0), "baseline": "./other", "of_baseline": make_evaluation(2.0)}
    run = collect_run(
        make_run(stages=[make_stage("dpo", "dpo", init="model", eval=scored)], metrics=[])
    )
    assert [stage.name for stage in run.compared] == ["other, before", "dpo"]
    assert "2.00" not in judge(run).headline
    assert not [f for f in judge(run).of_stage("dpo") if f.key.startswith("figure")]


def test_a_stage_that_is_not_measured_yet_says_nothing_of_those_before(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    rewards = {"sft": 3.0, "dpo": 4.0, "rpo-1": 3.9, "rpo-2": 3.8}
    stages = [
        make_stage(name, name[:3], init=init, eval=make_evaluation(reward))
        for (name, reward), init in zip(rewards.items(), ["model", *rewards], strict=False)
    ]
    stages.append(make_stage("rpo-3", "rpo", init="rpo-2", state="running", eval={}))
    run = collect_run(make_run(stages=stages, metrics=[]))
    assert not [f for f in judge(run).of_stage("rpo-3") if f.key == "figure-keeps-falling"]
    finding = about(run, "rpo-2", "figure-keeps-falling")
    assert "last 2" in finding.text and finding.advice is not None and "dpo." in finding.advice


def test_figures_of_another_scorer_do_not_compare(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval={**make_evaluation(3.0), "measure": "a"}),
        make_stage("dpo", "dpo", init="sft", eval={**make_evaluation(4.1), "measure": "a"}),
        make_stage("rpo", "rpo", init="dpo", eval={**make_evaluation(-2.1), "measure": "b"}),
    ]
    run = collect_run(make_run(stages=stages, metrics=[]))
    finding = about(run, "rpo", "figures-do-not-compare")
    assert finding.level == "info" and "dpo" in finding.text
    assert not [f for f in judge(run).of_stage("rpo") if f.key.startswith("figure-")]
    assert "-2.1" not in judge(run).headline and "−2.1" not in judge(run).headline
    marked = [cell for column in comparison(run) for cell in column.cells if cell.best]
    assert not marked
