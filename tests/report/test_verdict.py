from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rpo_trainer.report.collect import RunRecord, collect_run
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.verdict import judge

Make = Callable[..., Any]


def about(run: RunRecord, stage: str, words: str) -> Finding:
    found = [finding for finding in judge(run).of_stage(stage) if words in finding.text]
    assert len(found) == 1, [finding.text for finding in judge(run).of_stage(stage)]
    return found[0]


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


def test_likelihood_decline_is_called_out_with_what_to_change(
    make_run: Make, make_preference_rows: Make
) -> None:
    rows = make_preference_rows("dpo", delta=-8.0, rejected=-12.0)
    run = collect_run(make_run(metrics=rows))
    finding = about(run, "dpo", "Likelihood decline")
    # The last tenth of 40 steps: parts 37/40 to 40/40, on average 0.9625 of the way.
    assert "fell by 7.70 nats per response (38% of its size)" in finding.text
    assert "it fell in 75% of the examples" in finding.text
    assert "Rejected ones fell by 11.55" in finding.text
    assert finding.level == "warn"
    assert finding.advice is not None
    assert finding.advice.startswith("Set sft_loss_weight above 0 (it is 0)")
    assert "raise β (it is 0.5)" in finding.advice
    assert judge(run).level == "warn"


def test_a_weight_that_is_set_should_be_raised(make_run: Make, make_preference_rows: Make) -> None:
    rows = make_preference_rows("rpo-1", delta=-8.0, rejected=-12.0, beta=0.25)
    advice = about(collect_run(make_run(metrics=rows)), "rpo-1", "Likelihood decline").advice
    assert advice is not None
    assert "raise sft_loss_weight (it is 0.005" in advice.lower()


def test_a_small_fall_is_no_warning(make_run: Make, make_preference_rows: Make) -> None:
    run = collect_run(make_run(metrics=make_preference_rows("dpo", delta=-0.3)))
    assert about(run, "dpo", "hardly fell").level == "good"


def test_chosen_delta_comes_from_the_implicit_reward_where_it_was_not_logged(
    make_run: Make, make_preference_rows: Make
) -> None:
    rows = make_preference_rows("dpo", delta=-8.0, beta=0.5)
    for row in rows:
        del row["logps/chosen_delta"]
    assert "7.70 nats" in about(collect_run(make_run(metrics=rows)), "dpo", "Likelihood").text


def test_a_failed_step_zero_check_is_bad(make_run: Make, make_stage: Make) -> None:
    failed = {"loss": 0.9, "expected": 0.6931, "ok": False}
    run = collect_run(make_run(stages=[make_stage("dpo", "dpo", step0=failed)], metrics=[]))
    assert about(run, "dpo", "Step-0 check failed (loss 0.9000, expected 0.6931)").level == "bad"
    assert judge(run).level == "bad"


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
    assert about(run, "dpo", "40 rows were dropped (40%)").level == "warn"
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
    assert about(collect_run(run_dir), "dpo", "400 rows were dropped (40%)").level == "warn"
    recipe = (run_dir / "recipe.yaml").read_text()
    sampled = recipe.replace("kind: dpo,", "kind: dpo, data: {generate: {responses: 4}},")
    (run_dir / "recipe.yaml").write_text(sampled)
    finding = about(collect_run(run_dir), "dpo", "400 rows were dropped (40%)")
    assert finding.level == "info" and "higher temperature" in str(finding.advice)


def test_what_several_stages_share_is_said_once(make_run: Make, make_stage: Make) -> None:
    def stage(name: str, remark: str) -> Any:
        return make_stage(name, "dpo", data={"audit": {"remarks": [remark, f"about {name}"]}})

    run_dir = make_run(stages=[stage("a", "x"), stage("b", "x"), stage("c", "y")], metrics=[])
    shown = [(f.stage, f.text) for f in judge(collect_run(run_dir)).grouped_warnings()]
    assert shown == [
        ("a, b", "About the data: x."),
        ("a", "About the data: about a."),
        ("b", "About the data: about b."),
        ("c", "About the data: y."),
        ("c", "About the data: about c."),
    ]


def test_an_upload_that_failed_is_said_with_the_command(make_run: Make, make_stage: Make) -> None:
    failed = make_stage("sft", "sft", hub={"repo": "me/it", "error": "401: no such token"})
    done = make_stage("dpo", "dpo", init="sft", hub={"repo": "me/it-2", "commit": "c0ffee"})
    run = collect_run(make_run(stages=[failed, done]))
    finding = about(run, "sft", "The output is not on the hub (me/it): 401: no such token.")
    assert finding.level == "warn" and finding.advice is not None
    assert finding.advice.endswith("hf upload me/it sft/final")
    assert about(run, "dpo", "The output is on the hub: me/it-2.").level == "info"


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
