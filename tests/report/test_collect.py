from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.errors import RunError
from rpo_trainer.report.collect import Curve, collect_run
from rpo_trainer.stages.record import AuditRecord, DataRecord, StepZeroRecord
from tests.raising import raises

Make = Callable[..., Any]


def test_curves_are_finite_and_by_step_with_the_last_value_of_a_repeated_step(
    make_run: Make,
) -> None:
    rows = [
        {"stage": "sft", "step": 2, "loss": 2.0},
        {"stage": "sft", "step": 1, "loss": 3.0},
        {"stage": "sft", "step": 2, "loss": 1.5},  # logged again after a resume
        {"stage": "sft", "step": 3, "loss": float("nan")},
        {"stage": "sft", "step": 4, "loss": "text"},
    ]
    stage = collect_run(make_run(metrics=rows)).stages[0]
    assert stage.curve("loss") == Curve([1, 2], [3.0, 1.5])
    assert stage.non_finite_step() == 3
    assert not stage.curve("never logged")


def test_start_and_end_are_means_over_a_tenth() -> None:
    curve = Curve(list(range(20)), [float(value) for value in range(20)])
    assert (curve.start(), curve.end()) == (0.5, 18.5)
    assert Curve([1], [4.0]).end() == 4.0


def test_settings_of_a_repeated_stage_and_defaults(make_run: Make) -> None:
    run = collect_run(make_run())
    rpo, sft = run.stage("rpo-1"), run.stage("sft")
    assert rpo is not None
    assert sft is not None
    assert rpo.setting("beta") == 0.25
    assert rpo.setting("learning_rate") == 3e-5
    assert sft.setting("learning_rate") == 1e-3


def test_parent_follows_init(make_run: Make, make_stage: Make) -> None:
    run = collect_run(
        make_run(
            stages=[
                make_stage("a", "sft", init="model"),
                make_stage("b", "sft", init="previous"),
                make_stage("c", "dpo", init="a"),
                make_stage("d", "dpo", init="a/final"),
                make_stage("e", "dpo", init="some/folder"),
            ],
            metrics=[],
        )
    )
    parents = [run.parent(stage) for stage in run.stages]
    assert [parent and parent.name for parent in parents] == [None, "a", "a", "a", None]


def test_damage_is_noted_and_the_rest_is_used(make_run: Make) -> None:
    run_dir = make_run()
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "sft", "step": 41, "lo')
    (run_dir / "recipe.yaml").write_text("stages: [", encoding="utf-8")
    run = collect_run(run_dir)
    assert any("metrics.jsonl: 1 line" in note for note in run.notes)
    assert any("recipe.yaml" in note for note in run.notes)
    assert len(run.stages[0].curve("loss").values) == 40


def test_without_chain_json_the_stages_come_from_the_metrics(make_run: Make) -> None:
    run_dir = make_run()
    (run_dir / "chain.json").unlink()
    run = collect_run(run_dir)
    assert [(stage.name, stage.kind) for stage in run.stages] == [
        ("sft", "sft"),
        ("dpo", "rpo"),  # all that is known: target gaps were logged
        ("rpo-1", "rpo"),
    ]
    assert not run.finished


def test_samples_of_another_shape_are_left_out(make_run: Make) -> None:
    chat = [{"role": "user", "content": "2+2"}]
    rows = [{"prompt": chat, "ground_truth": "4", "sampled": "5", "reward": "high"}, {"prompt": 3}]
    found, other = collect_run(make_run(samples={"sft": rows})).stages[0].samples
    assert (found.prompt, found.sampled, found.greedy, found.reward) == (chat, "5", None, None)
    assert other.prompt == ""


def test_of_a_damaged_record_what_fits_is_read(make_run: Make, make_stage: Make) -> None:
    damaged = make_stage(
        "dpo", "dpo", seconds="long", steps=[3], hub={"repu": "me/it"}, state="dune"
    )
    damaged["data"] = {
        "fingerprint": "abc",
        "audit": {"rows": 9, "dropped": [], "remarks": ["a", 2]},
    }
    damaged["step0"] = {"loss": math.inf, "expected": 0.5, "ok": "yes"}
    record = collect_run(make_run(stages=[damaged], metrics=[])).stages[0].record
    assert (record.seconds, record.steps, record.hub, record.state) == (None, None, None, "pending")
    assert record.examples == 1234 and record.step0 == StepZeroRecord(expected=0.5)
    assert record.data == DataRecord("abc", AuditRecord(rows=9, remarks=["a"]))


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": 3}', '{"stages": [1, null]}', "{"])
def test_any_chain_json_can_be_read(make_run: Make, content: str) -> None:
    run_dir = make_run()
    (run_dir / "chain.json").write_text(content, encoding="utf-8")
    assert "sft" in [stage.name for stage in collect_run(run_dir).stages]


def test_another_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({}), encoding="utf-8")
    with raises("run.not-a-run-directory", RunError, where=str(tmp_path)):
        collect_run(tmp_path)
