from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import collect_run
from rpo_trainer.report.scores import MAIN_FIGURES
from rpo_trainer.report.verdict import judge
from tests.report.conftest import about

Make = Callable[..., Any]


def test_a_good_run_is_called_good_with_its_figures(make_run: Make) -> None:
    run = collect_run(make_run())
    verdict = judge(run)
    assert verdict.level == "good"
    assert verdict.warnings == []
    main = MAIN_FIGURES["reward_sampled"].capitalize()
    assert "3 stages" in verdict.headline and run.finished
    assert verdict.headline.endswith(
        f"{main} rose from 2.79 after sft to 3.87 after rpo-1 (+1.08)."
    )
    for stage, key, figures in (
        ("sft", "nll-fell", "2.700 to 1.500"),
        ("dpo", "figure-rose", "2.79 to 3.41 (+0.62 relative to sft)"),
        ("dpo", "likelihood-rose", "1.44 nats"),  # 0.9625 of 1.5
    ):
        finding = about(run, stage, key)
        assert finding.level == "good" and figures in finding.text


def test_a_failed_step_zero_check_is_bad(make_run: Make, make_stage: Make) -> None:
    failed = {"loss": 0.9, "expected": 0.6931, "ok": False}
    run = collect_run(make_run(stages=[make_stage("dpo", "dpo", step0=failed)], metrics=[]))
    finding = about(run, "dpo", "step0-failed")
    assert finding.level == "bad" and "0.9000" in finding.text and "0.6931" in finding.text
    assert judge(run).level == "bad"


def test_nll_that_rises_is_bad_and_overfitting_a_warning(make_run: Make) -> None:
    def losses(*values: float) -> list[dict[str, Any]]:
        return [
            {"stage": "sft", "step": step, "eval_loss": value}
            for step, value in enumerate(values, 1)
        ]

    run_dir = make_run(metrics=losses(2.0, 2.5))
    finding = about(collect_run(run_dir), "sft", "nll-did-not-fall")
    assert finding.level == "bad" and "2.000" in finding.text and "2.500" in finding.text
    other = run_dir / "metrics.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in losses(2.0, 1.0, 1.5)), encoding="utf-8")
    finding = about(collect_run(run_dir), "sft", "overfitting")
    assert finding.level == "warn" and "step 2 (1.000)" in finding.text


def test_a_non_finite_loss_is_bad(make_run: Make) -> None:
    rows = [{"stage": "sft", "step": 7, "loss": float("inf")}]
    finding = about(collect_run(make_run(metrics=rows)), "sft", "loss-not-finite")
    assert finding.level == "bad" and "step 7" in finding.text


def test_saturated_targets_are_a_warning(make_run: Make) -> None:
    wide = [
        {"id": str(n), "implicit_gap": 1.0, "target_gap": 9.0 if n < 8 else 1.0} for n in range(10)
    ]
    run = collect_run(make_run(gaps={"rpo-1": wide}))
    finding = about(run, "rpo-1", "targets-saturated")
    assert finding.level == "warn" and "80%" in finding.text
    assert finding.advice is not None
    assert "reward_scale" in finding.advice


def test_overshooting_the_target_is_a_warning(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows(
        "rpo-1", delta=6.0, rejected=-14.0, beta=0.25
    )  # ends near 4.8 of 2.5
    finding = about(collect_run(make_run(metrics=rows)), "rpo-1", "gap-overshoots")
    assert finding.level == "warn" and "2.50" in finding.text


def test_a_gap_far_below_its_target_is_amber_with_what_to_change(
    make_run: Make, make_preference_rows: Make
) -> None:
    # Ends at 0.9625 of 0.25 · (1 + 3) = 0.9625, with a target of 2.5; 2.4 times the gap is enough.
    rows = make_preference_rows("rpo-1", delta=1.0, rejected=-3.0, beta=0.25)
    run = collect_run(make_run(metrics=rows))
    finding = about(run, "rpo-1", "gap-short")
    assert finding.level == "warn" and "38%" in finding.text and "0.96 of 2.50" in finding.text
    assert "3.85 of 10.00 nats" in finding.text  # divided by β
    advice = str(finding.advice)
    for key in ("learning_rate (now 3e-05)", "num_train_epochs", "beta (now 0.25)", "reward_scale"):
        assert key in advice
    assert judge(run).level == "warn"


def test_half_of_the_target_gap_is_good(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows("rpo-1", delta=2.0, rejected=-4.0, beta=0.25)
    finding = about(collect_run(make_run(metrics=rows)), "rpo-1", "gap")
    assert finding.level == "good" and "58%" in finding.text


def test_a_gap_that_is_still_growing_is_no_warning(
    make_run: Make, make_stage: Make, make_preference_rows: Make
) -> None:
    rows = make_preference_rows("rpo-1", delta=0.1, rejected=-0.1, beta=0.25)
    run = collect_run(make_run(stages=[make_stage("rpo-1", "rpo", state="running")], metrics=rows))
    assert about(run, "rpo-1", "gap-short").level == "info"


def test_no_margin_is_bad(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows("dpo", delta=-1.0, rejected=2.0)
    assert about(collect_run(make_run(metrics=rows)), "dpo", "gap").level == "bad"


def test_remarks_and_many_drops_are_warnings(make_run: Make, make_stage: Make) -> None:
    audit = {
        "read": {"a": 100},
        "dropped": {"tie": {"count": 40, "examples": []}},
        "remarks": ["a remark"],
    }
    stages = [make_stage("dpo", "dpo", data={"audit": audit})]
    run = collect_run(make_run(stages=stages, metrics=[]))
    dropped, remark = about(run, "dpo", "data-dropped"), about(run, "dpo", "data-remark")
    assert dropped.level == "warn" and "40%" in dropped.text and "40 rows" in dropped.text
    assert remark.level == "warn" and remark.text == "a remark."


def test_an_unfinished_run_says_how_far_it_is(make_run: Make, make_stage: Make) -> None:
    stages = [
        make_stage("sft", "sft", init="model", state="running", steps=90),
        make_stage("dpo", "dpo", state="pending", step0=None),
    ]
    rows = [{"stage": "sft", "step": step, "loss": 1 / step} for step in (10, 20)]
    run = collect_run(make_run(stages=stages, metrics=rows))
    verdict = judge(run)
    assert "0 of 2" in verdict.headline and not run.finished
    assert verdict.level == "info"
    assert "20 of 90" in about(run, "sft", "not-finished").text
    assert [finding.key for finding in verdict.of_stage("dpo")] == ["not-started"]


def test_warnings_given_in_training_are_kept(make_run: Make, make_stage: Make) -> None:
    given = {
        "step": 20, "name": "margins_exploding", "text": "the gap is 12", "advice": "lower it",
    }  # fmt: skip
    stages = [make_stage("dpo", "dpo", warnings=[given, "nonsense", {"step": "x"}])]
    finding = about(collect_run(make_run(stages=stages)), "dpo", "warned-margins_exploding")
    assert finding.level == "warn" and f"step 20: {given['text']}." in finding.text
    assert finding.advice is not None and finding.advice.endswith(f"{given['advice']}.")


def test_prompts_that_get_one_answer_again_and_again_are_no_alarm(
    make_run: Make, make_stage: Make
) -> None:
    dropped = {"fewer_than_two_responses": {"count": 400, "examples": []}}
    audit = {"read": {"a": 1000}, "kept": {"a": 600}, "dropped": dropped}
    run_dir = make_run(stages=[make_stage("dpo", "dpo", data={"audit": audit})], metrics=[])
    assert about(collect_run(run_dir), "dpo", "data-dropped").level == "warn"
    recipe = (run_dir / "recipe.yaml").read_text()
    sampled = recipe.replace("kind: dpo,", "kind: dpo, data: {generate: {responses: 4}},")
    (run_dir / "recipe.yaml").write_text(sampled)
    finding = about(collect_run(run_dir), "dpo", "data-dropped")
    assert finding.level == "info" and "temperature" in str(finding.advice)


def test_what_several_stages_share_is_reported_once(make_run: Make, make_stage: Make) -> None:
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


def test_an_upload_that_failed_is_reported_with_the_command(
    make_run: Make, make_stage: Make
) -> None:
    failed = make_stage("sft", "sft", hub={"repo": "me/it", "error": "401: no such token"})
    done = make_stage("dpo", "dpo", init="sft", hub={"repo": "me/it-2", "commit": "c0ffee"})
    run = collect_run(make_run(stages=[failed, done]))
    finding = about(run, "sft", "hub-failed")
    assert finding.level == "warn" and finding.advice is not None
    assert "me/it" in finding.text and "401: no such token" in finding.text
    assert finding.advice.endswith("hf upload me/it sft/final")
    finding = about(run, "dpo", "hub-pushed")
    assert finding.level == "info" and "me/it-2" in finding.text
