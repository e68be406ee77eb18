from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.verdict import judge
from tests.report.conftest import about

Make = Callable[..., Any]


def test_a_good_run_is_called_good_with_its_figures(make_run: Make) -> None:
    run = collect_run(make_run())
    verdict = judge(run)
    assert verdict.level == "good"
    assert verdict.warnings == []
    assert verdict.headline == (
        "The chain finished: 3 stages. Mean reward of sampled responses rose from 2.79 after sft "
        "to 3.87 after rpo-1 (+1.08)."
    )
    assert about(run, "sft", "Held-out NLL fell from 2.700 to 1.500").level == "good"
    assert about(run, "dpo", "rose from 2.79 to 3.41 (+0.62 on sft)").level == "good"
    assert about(run, "dpo", "log-prob of chosen responses rose by 1.").level == "good"


def test_a_failed_step_zero_check_is_bad(make_run: Make, make_stage: Make) -> None:
    failed = {"loss": 0.9, "expected": 0.6931, "ok": False}
    run = collect_run(make_run(stages=[make_stage("dpo", "dpo", step0=failed)], metrics=[]))
    assert about(run, "dpo", "Step-0 check failed (loss 0.9000, expected 0.6931)").level == "bad"
    assert judge(run).level == "bad"


def test_nll_that_rises_is_bad_and_overfitting_a_warning(make_run: Make) -> None:
    def losses(*values: float) -> list[dict[str, Any]]:
        return [
            {"stage": "sft", "step": step, "eval_loss": value}
            for step, value in enumerate(values, 1)
        ]

    run_dir = make_run(metrics=losses(2.0, 2.5))
    assert about(collect_run(run_dir), "sft", "did not fall: 2.000 before").level == "bad"
    other = run_dir / "metrics.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in losses(2.0, 1.0, 1.5)), encoding="utf-8")
    finding = about(collect_run(run_dir), "sft", "lowest at step 2 (1.000)")
    assert finding.level == "warn"


def test_a_non_finite_loss_is_bad(make_run: Make) -> None:
    rows = [{"stage": "sft", "step": 7, "loss": float("inf")}]
    assert about(collect_run(make_run(metrics=rows)), "sft", "not finite at step 7").level == "bad"


def test_saturated_targets_are_a_warning(make_run: Make) -> None:
    wide = [
        {"id": str(n), "implicit_gap": 1.0, "target_gap": 9.0 if n < 8 else 1.0} for n in range(10)
    ]
    run = collect_run(make_run(gaps={"rpo-1": wide}))
    finding = about(run, "rpo-1", "for 80% of the examples")
    assert finding.level == "warn"
    assert finding.advice is not None
    assert "reward_scale" in finding.advice


def test_overshooting_the_target_is_a_warning(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows(
        "rpo-1", delta=6.0, rejected=-14.0, beta=0.25
    )  # ends near 4.8 of 2.5
    assert about(collect_run(make_run(metrics=rows)), "rpo-1", "target gap is 2.50").level == "warn"


def test_no_margin_is_bad(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows("dpo", delta=-1.0, rejected=2.0)
    assert about(collect_run(make_run(metrics=rows)), "dpo", "implicit gap ended").level == "bad"


def test_remarks_and_many_drops_are_warnings(make_run: Make, make_stage: Make) -> None:
    audit = {
        "read": {"a": 100},
        "dropped": {"tie": {"count": 40, "examples": []}},
        "remarks": ["all reward gaps are equal (1)"],
    }
    stages = [make_stage("dpo", "dpo", data={"audit": audit})]
    run = collect_run(make_run(stages=stages, metrics=[]))
    assert about(run, "dpo", "40 % of the rows (40 rows) are dropped").level == "warn"
    assert about(run, "dpo", "all reward gaps are equal").level == "warn"


def test_an_unfinished_run_says_how_far_it_is(make_run: Make, make_stage: Make) -> None:
    stages = [
        make_stage("sft", "sft", init="model", state="running", steps=90),
        make_stage("dpo", "dpo", state="pending", step0=None),
    ]
    rows = [{"stage": "sft", "step": step, "loss": 1 / step} for step in (10, 20)]
    run = collect_run(make_run(stages=stages, metrics=rows))
    verdict = judge(run)
    assert verdict.headline.startswith("The chain is not finished: 0 of 2 stages done.")
    assert verdict.level == "info"
    assert about(run, "sft", "Not finished").text.startswith(
        "Not finished; last logged step: 20 of 90"
    )
    assert [finding.text for finding in verdict.of_stage("dpo")] == ["Has not started."]


def test_warnings_given_in_training_are_kept(make_run: Make, make_stage: Make) -> None:
    said = {"step": 20, "text": "the implicit gap is 12", "advice": "lower learning_rate"}
    stages = [make_stage("dpo", "dpo", warnings=[said, "nonsense", {"step": "x"}])]
    finding = about(collect_run(make_run(stages=stages)), "dpo", "In training, at step 20: the")
    assert finding.level == "warn" and finding.advice == "To try: lower learning_rate."


def test_prompts_that_get_one_answer_again_and_again_are_no_alarm(
    make_run: Make, make_stage: Make
) -> None:
    dropped = {"fewer_than_two_responses": {"count": 400, "examples": []}}
    audit = {"read": {"a": 1000}, "kept": {"a": 600}, "dropped": dropped}
    run_dir = make_run(stages=[make_stage("dpo", "dpo", data={"audit": audit})], metrics=[])
    assert (
        about(collect_run(run_dir), "dpo", "40 % of the rows (400 rows) are dropped").level
        == "warn"
    )
    recipe = (run_dir / "recipe.yaml").read_text()
    sampled = recipe.replace("kind: dpo,", "kind: dpo, data: {generate: {responses: 4}},")
    (run_dir / "recipe.yaml").write_text(sampled)
    finding = about(collect_run(run_dir), "dpo", "40 % of the rows (400 rows) are dropped")
    assert finding.level == "info" and "higher temperature" in str(finding.advice)


def test_what_several_stages_share_is_said_once(make_run: Make, make_stage: Make) -> None:
    def stage(name: str, remark: str) -> Any:
        return make_stage(name, "dpo", data={"audit": {"remarks": [remark, f"about {name}"]}})

    run_dir = make_run(stages=[stage("a", "x"), stage("b", "x"), stage("c", "y")], metrics=[])
    shown = [(f.stage, f.text) for f in judge(collect_run(run_dir)).grouped_warnings()]
    assert shown == [
        ("a, b", "x."),
        ("a", "about a."),
        ("b", "about b."),
        ("c", "y."),
        ("c", "about c."),
    ]


def test_an_upload_that_failed_is_said_with_the_command(make_run: Make, make_stage: Make) -> None:
    failed = make_stage("sft", "sft", hub={"repo": "me/it", "error": "401: no such token"})
    done = make_stage("dpo", "dpo", init="sft", hub={"repo": "me/it-2", "commit": "c0ffee"})
    run = collect_run(make_run(stages=[failed, done]))
    finding = about(run, "sft", "The output is not on the hub (me/it): 401: no such token.")
    assert finding.level == "warn" and finding.advice is not None
    assert finding.advice.endswith("hf upload me/it sft/final")
    assert about(run, "dpo", "The output is on the hub: me/it-2.").level == "info"
