"""`data.eval_fraction` in every kind of stage: the same prompts in run, check, plan and preview."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.data import Audit
from rpo_trainer.plan import plan_recipe
from rpo_trainer.recipe import load_recipe
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.preview import preview
from tests.chain import tiny
from tests.raising import raises

PROMPTS = 20
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "dpo": {"kind": "dpo", "beta": 0.1},
    "rpo": {"kind": "rpo", "beta": 0.1},
    "bradley_terry": {"kind": "reward", "objective": "bradley_terry"},
    "regression": {"kind": "reward", "objective": "regression", "attributes": ["good"]},
}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Two rows of each prompt."""
    made = []
    for number in range(PROMPTS):
        for turn in range(2):
            row: dict[str, Any] = {"prompt": f"{number} + 0 = ", "id": f"{number}-{turn}"}
            if name == "sft":
                row["response"] = str(number)
            elif name == "regression":
                row |= {"response": str(number), "attributes": {"good": float(turn)}}
            else:
                row |= {"chosen": str(number), "rejected": str(number + 1 + turn)}
                row |= {"chosen_reward": 2.0 + turn, "rejected_reward": 1.0}
            made.append(row)
    return made


def recipe_of(folder: Path, name: str, **data: Any) -> tiny.Recipe:
    text = "".join(json.dumps(row) + "\n" for row in rows_of(name))
    (folder / "rows.jsonl").write_text(text)
    recipe = tiny.tiny_recipe()
    own = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.25, **data}
    recipe["stages"] = [{"name": "own", **STAGES[name], "max_steps": 1, "data": own}]
    return recipe


def held_out(folder: Path, recipe: tiny.Recipe) -> tuple[list[str], list[str]]:
    """Ids of the trained and of the held-out rows."""
    preparer = StagePreparer(tiny.load(folder, recipe))
    rows, held = preparer.rows(preparer.stages[-1], Audit())
    assert held is not None
    return [row["id"] for row in rows], [row["id"] for row in held]


@pytest.mark.parametrize("name", STAGES)
def test_all_rows_of_a_prompt_are_on_one_side(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, name)
    train, held = held_out(tmp_path, recipe)
    assert (len(train), len(held)) == (30, 10)
    assert not {i.partition("-")[0] for i in train} & {i.partition("-")[0] for i in held}
    assert held_out(tmp_path, recipe) == (train, held)  # the same again
    recipe["stages"][0]["seed"] = 99
    assert held_out(tmp_path, recipe)[1] != held


@pytest.mark.parametrize("name", STAGES)
def test_check_plan_preview_and_run_agree(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, name)
    loaded = tiny.load(tmp_path, recipe)
    lines = [line.strip() for line in check_recipe(loaded, tmp_path / "run")]
    assert "30 examples, 1 step" in lines and "10 held-out examples" in lines
    (planned,) = plan_recipe(loaded, tmp_path / "run").stages
    assert planned.examples == 30
    shown = [text.plain for text in preview(loaded, 1, colors=False)]
    assert any(line.startswith("30 rows") for line in shown)
    caplog.set_level(logging.INFO, logger="rpo_trainer")
    logging.getLogger("rpo_trainer").propagate = True
    run_dir = tiny.run(tmp_path, recipe)
    assert any("eval_fraction" in m and "10" in m for m in caplog.messages)
    record = json.loads((run_dir / "chain.json").read_text())["stages"][0]
    assert record["examples"] == 30
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in row for row in metrics)


def test_rows_are_held_out_whatever_the_filter_is(tmp_path: Path) -> None:
    _, every = held_out(tmp_path, recipe_of(tmp_path, "rpo"))
    _, some = held_out(tmp_path, recipe_of(tmp_path, "rpo", filter={"min_gap": 1.5}))
    assert some == [i for i in every if i.endswith("-1")]


def test_eta_is_fitted_to_the_trained_rows_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "rpo")
    train, held = held_out(tmp_path, recipe)
    rows = rows_of("rpo")
    for row in rows:
        if row["id"] in held:
            row["chosen_reward"] = 1000.0
    recipe["stages"][0]["reward_scale"] = "auto"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    scales = []
    for content in (text, "".join(json.dumps(r) + "\n" for r in rows if r["id"] in train)):
        (tmp_path / "rows.jsonl").write_text(content)
        if content != text:
            del recipe["stages"][0]["data"]["eval_fraction"]
        preparer = StagePreparer(tiny.load(tmp_path, recipe))
        scales.append(preparer.prepare(preparer.stages[0]).stage.reward_scale)
    assert scales[0] == scales[1]


def test_replay_takes_what_the_earlier_stage_was_trained_on(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "sft")
    _, held = held_out(tmp_path, recipe)
    replay = {"stage": "own", "fraction": 0.9, "of": "source"}
    data = {"train": [tiny.task("code", "train", 8)], "replay": replay}
    recipe["stages"].append({"name": "next", "kind": "sft", "max_steps": 1, "data": data})
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    rows, _ = preparer.rows(preparer.stages[1], Audit())
    replayed = {row["id"] for row in rows} & {row["id"] for row in rows_of("sft")}
    assert len(replayed) == 27 and not replayed & set(held)


def test_prompts_are_held_out_before_their_responses_are_sampled(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, "dpo", train=[tiny.task("code", "train", 20)],
        generate={"responses": 3, "max_new_tokens": 4}, score={"verifier": "partial_match"},
    )  # fmt: skip
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    (stage,) = preparer.stages
    before = preparer.prepare(stage)
    held = before.held_out_prompts
    assert held is not None and (len(before.prompts), len(held)) == (15, 5)
    tie = held[0]["id"]
    made = [
        {**row, "responses": ["a", "b"], "rewards": [1.0, float(row["id"] == tie)]}
        for row in preparer.prompts(stage, Audit())
    ]
    train, tested = preparer.rows(stage, Audit(), made)
    assert {row["id"] for row in train} == {row["id"] for row in before.prompts}
    assert tested is not None and len(tested) == 4  # one was a tie
    loaded = tiny.load(tmp_path, recipe)
    assert any("20 prompts (5 held out)" in line for line in check_recipe(loaded, tmp_path / "r"))
    (planned,) = plan_recipe(loaded, tmp_path / "r").stages
    assert planned.examples == 15


def test_it_does_not_go_with_eval(tmp_path: Path) -> None:
    for name in STAGES:
        recipe = recipe_of(tmp_path, name, eval=[{"path": "rows.jsonl"}])
        with raises("recipe.conflicting-fields") as error:
            load_recipe(tiny.write_recipe(tmp_path, recipe))
        assert "eval_fraction" in str(error.value)
