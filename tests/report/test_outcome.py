from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
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
    assert about(run, "dpo", "may be noise").level == "info"
    assert judge(run).headline.endswith(
        "went from 3.00 after sft to 3.10 after dpo (+0.10). The intervals overlap: it may be noise."
    )


def test_a_reward_that_fell_is_bad(make_run: Make, make_stage: Make, make_evaluation: Make) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval=make_evaluation(3.0)),
        make_stage("dpo", "dpo", eval=make_evaluation(2.0)),
    ]
    run = collect_run(make_run(stages=stages))
    assert about(run, "dpo", "fell from 3.00 to 2.00 (−1.00 on sft)").level == "bad"


def test_a_win_rate_is_judged_by_its_interval(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    def level(low: float, high: float) -> str:
        wins = {"value": (low + high) / 2, "low": low, "high": high}
        scored = {**make_evaluation(3.0), "baseline": "sft", "win_rate": wins}
        chain = json.loads((run_dir / "chain.json").read_text())
        chain["stages"] = [make_stage("dpo", "dpo", eval=scored)]
        (run_dir / "chain.json").write_text(json.dumps(chain))
        return about(collect_run(run_dir), "dpo", "of the time against sft").level

    run_dir = make_run()
    assert [level(0.55, 0.65), level(0.3, 0.4), level(0.4, 0.6)] == ["good", "bad", "info"]


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
    finding = about(run, "rpo-3", "has fallen in each of the last 3 stages")
    assert "Mean reward of sampled responses" in finding.text
    assert finding.text.endswith("3.44, 3.42, 3.38, 3.27.") and finding.level == "warn"
    assert finding.advice is not None and finding.advice.startswith("Take the output of dpo.")
    assert not [f for f in judge(run).of_stage("rpo-2") if "has fallen" in f.text]
    headline = judge(run).headline
    assert "to 3.27 after rpo-3 (+0.59). It was best after dpo: 3.44." in headline


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
    rose = about(run, "dpo", "rose from 2.00 to 3.00 (+1.00 on what it was before the run)")
    assert rose.level == "good"
    assert about(run, "rpo", "rose from 3.00 to 4.00 (+1.00 on dpo)").level == "good"
    assert "rose from 2.00 before the run to 4.00 after rpo (+2.00)." in judge(run).headline


def test_a_baseline_that_seeded_nothing_is_no_start(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    scored = {**make_evaluation(3.0), "baseline": "./other", "of_baseline": make_evaluation(2.0)}
    run = collect_run(
        make_run(stages=[make_stage("dpo", "dpo", init="model", eval=scored)], metrics=[])
    )
    assert [stage.name for stage in run.compared] == ["other, before", "dpo"]
    assert "before the run" not in judge(run).headline
    assert not [f for f in judge(run).of_stage("dpo") if "before the run" in f.text]


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
    assert not [f for f in judge(run).of_stage("rpo-3") if "has fallen" in f.text]
    finding = about(run, "rpo-2", "has fallen in each of the last 2 stages")
    assert finding.advice is not None and finding.advice.startswith("Take the output of dpo.")


def test_figures_of_another_scorer_do_not_compare(
    make_run: Make, make_stage: Make, make_evaluation: Make
) -> None:
    stages = [
        make_stage("sft", "sft", init="model", eval={**make_evaluation(3.0), "measure": "a"}),
        make_stage("dpo", "dpo", init="sft", eval={**make_evaluation(4.1), "measure": "a"}),
        make_stage("rpo", "rpo", init="dpo", eval={**make_evaluation(-2.1), "measure": "b"}),
    ]
    run = collect_run(make_run(stages=stages, metrics=[]))
    assert about(run, "rpo", "do not compare with those of dpo").level == "info"
    assert not [f for f in judge(run).of_stage("rpo") if "fell" in f.text]
    assert "-2.1" not in judge(run).headline and "−2.1" not in judge(run).headline
    marked = [cell for column in comparison(run) for cell in column.cells if cell.best]
    assert not marked
