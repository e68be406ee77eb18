"""Reward stages in a chain: their outputs, their inputs, and the policies that continue after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.report import summary_table
from tests.chain.tiny import load, metrics, records, run, stage_of, task, tiny_recipe
from tests.raising import raises, with_code

ATTRIBUTES = ["right", "long"]


def rated_rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"double {n}: ",
            "response": answer,
            "attributes": {"right": right, "long": len(answer) if n % 3 else None},
        }
        for n in range(12)
        for answer, right in ((str(2 * n), 4), (str(n), 1))
    ]


def recipe_with_rewards() -> dict[str, Any]:
    """SFT → Bradley-Terry on its own answers → regression from there → DPO from SFT."""
    recipe = tiny_recipe()
    code, dpo = stage_of(recipe, "code"), stage_of(recipe, "dpo")
    pairs = {
        "name": "bt", "kind": "reward", "objective": "bradley_terry", "margin_scale": 0.1,
        "max_steps": 3, "eval_steps": 2,
        "data": {
            "train": [task("general", "preference", 48, seed=1)],
            "generate": {"responses": 3, "max_new_tokens": 5, "batch_size": 48},
            "score": {"verifier": "partial_match"}, "pairs": {"select": "best_worst"},
            "eval_fraction": 0.25,
        },
    }  # fmt: skip
    ratings = {
        "name": "rated", "kind": "reward", "objective": "regression", "attributes": ATTRIBUTES,
        "reward_weights": {"right": 1.0, "long": -0.25}, "rating_range": [0, 4], "max_steps": 3,
        "data": {"train": [{"path": "rated.jsonl"}], "eval_fraction": 0.25},
    }  # fmt: skip
    recipe["stages"] = [code, pairs, ratings, dpo]
    dpo["eval"] = {
        "data": [task("general", "heldout", 4)],
        "generate": {"responses": 2, "max_new_tokens": 5}, "score": {"model": "rated"},
    }  # fmt: skip
    recipe["eval"] = {
        "data": [task("general", "heldout", 4)],
        "generate": {"responses": 1, "max_new_tokens": 3}, "score": {"verifier": "exact"},
    }  # fmt: skip
    return recipe


def write_rated(folder: Path, rows: list[dict[str, Any]] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rated.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows or rated_rows())
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    write_rated(folder)
    return run(folder, recipe_with_rewards())


def test_the_policy_goes_on_past_the_reward_stages(finished: Path) -> None:
    found = records(finished)
    assert {name: record["init"] for name, record in found.items()} == {
        "code": "model", "bt": "code", "rated": "code", "dpo": "code",
    }  # fmt: skip
    assert all(record["state"] == "done" for record in found.values())
    assert found["dpo"]["step0"]["ok"]


def test_the_output_is_a_classifier_with_its_tokenizer(finished: Path) -> None:
    final = finished / "rated" / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert model.config.id2label == {0: "right", 1: "long"}
    assert model.config.reward_weights == {"right": 1.0, "long": -0.25}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        scores = model(**tokenizer("double 3: 6</s>", return_tensors="pt")).logits
    assert scores.shape == (1, 2)


def test_it_measures_the_policies_that_come_after_it(finished: Path) -> None:
    found = records(finished)["dpo"]["eval"]
    assert found["scorer"] == "reward model rated" and found["baseline"] == "code"
    model = AutoModelForSequenceClassification.from_pretrained(finished / "rated" / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "rated" / "final")
    samples = [json.loads(line) for line in (finished / "dpo" / "samples.jsonl").open()]
    assert len(samples) == 4
    for sample in samples:
        for response, reward in (("sampled", "reward"), ("greedy", "greedy_reward")):
            text = f"{sample['prompt']}{sample[response]}{tokenizer.eos_token}"
            with torch.no_grad():
                right, long = model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
            assert sample[reward] == pytest.approx(right - 0.25 * long, abs=1e-4)
    assert 0 <= found["win_rate"]["value"] <= 1


def test_the_record_has_what_held_out_rows_say(finished: Path) -> None:
    found = records(finished)
    pairs, ratings = found["bt"], found["rated"]
    assert 0 <= pairs["eval"]["accuracy"] <= 1 and "pairs" in pairs["eval"]["calibration"]
    assert pairs["eval"]["accuracy"] == pairs["eval_after"]["eval_accuracy"]
    names = {"accuracy", "rmse/right", "bias/long", "pearson/reward", "spearman/reward"}
    assert names <= set(ratings["eval"])
    assert sum(row["count"] for row in ratings["eval"]["calibration"]["right"]) == 6
    # No responses are sampled from a reward model, even if the recipe's `eval` samples from policies.
    assert not (finished / "rated" / "samples.jsonl").exists()
    assert (finished / "dpo" / "samples.jsonl").exists()


def test_held_out_prompts_are_not_trained_on(finished: Path) -> None:
    remarks = [
        remark
        for name in ("bt", "rated")
        for remark in records(finished)[name]["data"]["audit"]["remarks"]
    ]
    assert not [remark for remark in remarks if "trained on" in remark]
    assert records(finished)["rated"]["examples"] == 18


def test_metrics_are_logged(finished: Path) -> None:
    rows = metrics(finished)
    trained = [m for m in rows if m["stage"] == "bt" and "loss" in m]
    assert trained and {"accuracy", "rewards/margins", "loss/bradley_terry"} <= set(trained[0])
    held_out = [m["step"] for m in rows if m["stage"] == "bt" and "eval_accuracy" in m]
    assert held_out == [0, 2, 3]


def test_status_shows_them(finished: Path) -> None:
    table = summary_table(finished)
    heads = [str(column.header).replace("\n", " ") for column in table.columns]
    assert "pair accuracy" in heads
    (column,) = [c for c in table.columns if str(c.header).replace("\n", " ") == "pair accuracy"]
    cells = [str(cell) for cell in column.cells]
    assert [cell == "–" for cell in cells] == [True, False, False, True]


def test_run_again_there_is_nothing_to_do(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (finished / "chain.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        run(finished.parent, recipe_with_rewards())
    assert (finished / "chain.json").stat().st_mtime_ns == before


def test_a_reward_stage_may_go_on_from_another(tmp_path: Path) -> None:
    write_rated(tmp_path)
    recipe = recipe_with_rewards()
    first = stage_of(recipe, "rated")
    second = {**first, "name": "more", "init": "rated", "reward_weights": None}
    recipe["stages"] = [stage_of(recipe, "code"), first, second]
    del recipe["eval"]
    folder = run(tmp_path, recipe)
    config = json.loads((folder / "more" / "final" / "config.json").read_text())
    assert config["reward_weights"] == {
        "right": 1.0,
        "long": -0.25,
    }  # the weights that it started with
    heads = [
        AutoModelForSequenceClassification.from_pretrained(folder / name / "final").score.weight
        for name in ("rated", "more")
    ]
    assert 0 < (heads[0] - heads[1]).norm() < 0.5 * heads[0].norm()


def test_a_policy_cannot_start_from_a_reward_models_directory(
    finished: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    recipe["stages"] = [{**stage_of(recipe, "code"), "init": str(finished / "rated" / "final")}]
    with raises("model.not-a-policy") as error:
        run(tmp_path, recipe)
    assert "stages.code.init" in str(error.value)


@pytest.mark.parametrize(
    ("change", "code", "shown"),
    [
        ({"rating_range": [0, 3]}, "data.rating-out-of-range", "0 to 3: 12 of 24 rows"),
        (
            {"attributes": ["right", "wit"], "reward_weights": None},
            "data.unrated-attribute",
            " wit",
        ),
    ],
)
def test_check_finds_bad_ratings(
    tmp_path: Path, change: dict[str, Any], code: str, shown: str
) -> None:
    write_rated(tmp_path)
    recipe = recipe_with_rewards()
    recipe["stages"] = [{**stage_of(recipe, "rated"), **change}]
    with raises(code) as error:
        check_recipe(load(tmp_path, recipe), tmp_path / "run")
    assert shown in with_code(error.value, code).what


def test_check_says_what_will_be_trained_and_held_out(tmp_path: Path) -> None:
    write_rated(tmp_path)
    recipe = recipe_with_rewards()
    recipe["stages"] = [stage_of(recipe, "rated")]
    lines = check_recipe(load(tmp_path, recipe), tmp_path / "run")
    assert lines[:3] == ["rated (reward)", "  18 examples, 3 steps", "  6 held-out examples"]
    assert "  right: 24 ratings, from 1 to 4, mean 2.50" in lines


def test_more_than_two_responses_say_to_make_pairs(tmp_path: Path) -> None:
    write_rated(tmp_path, [{"prompt": "p", "responses": ["a", "b", "c"], "rewards": [1, 2, 3]}] * 4)
    recipe = recipe_with_rewards()
    stage = {**stage_of(recipe, "bt"), "data": {"train": [{"path": "rated.jsonl"}]}}
    recipe["stages"] = [stage]
    with raises("data.more-than-two-responses") as found:
        check_recipe(load(tmp_path, recipe), tmp_path / "run")
    assert "select: best_worst" in str(found.value)
