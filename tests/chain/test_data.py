"""Rows of a stage: what they come from and when they are made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.data import (
    StageData,
    build_evaluation,
    build_rows,
    dataset_fingerprint,
    evaluation_prompts,
    needs_policy,
    source_digests,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.data import Audit
from rpo_trainer.errors import DataError
from rpo_trainer.loading import load_tokenizer, load_weights
from rpo_trainer.quickstart import character_tokenizer
from rpo_trainer.recipe import Recipe, SourceSpec, Stage, expand_stages
from tests.chain import tiny


def stages(folder: Path, recipe: tiny.Recipe | None = None) -> dict[str, Stage]:
    return {s.name: s for s in expand_stages(tiny.load(folder, recipe).recipe)}


def rows(stage: Stage, folder: Path, audit: Audit | None = None, **more: Any) -> list[Any]:
    settings = {"seed": 3, "audit": audit or Audit(), "earlier": None, **more}
    return build_rows(stage, folder, **settings)


def no_policy() -> Any:
    raise AssertionError("the policy was asked for")


def test_the_stages_own_seed_comes_first(tmp_path: Path) -> None:
    recipe: Recipe = tiny.load(tmp_path, tiny.changed(tiny.tiny_recipe(), "dpo.seed", 8)).recipe
    found = {s.name: stage_seed(s, recipe) for s in expand_stages(recipe)}
    assert found == {"code": 3, "general": 3, "dpo": 8, "rpo-1": 3, "rpo-2": 3}


def test_replay_takes_rows_of_the_earlier_stage(tmp_path: Path) -> None:
    found = stages(tmp_path)
    asked: list[str] = []

    def earlier(name: str) -> list[Any]:
        asked.append(name)
        return rows(found[name], tmp_path)

    mixed = rows(found["general"], tmp_path, earlier=earlier)
    assert asked == ["code"]
    code = {row["id"] for row in rows(found["code"], tmp_path)}
    assert len(mixed) == 44 and sum(row["id"] in code for row in mixed) == 4


def test_responses_are_sampled_once_and_read_again(finished: Path, tmp_path: Path) -> None:
    stage = stages(tmp_path)["dpo"]
    assert needs_policy(stage.data) and not needs_policy(stages(tmp_path)["code"].data)
    asked = []

    def policy() -> Any:
        asked.append(1)
        return load_weights(finished / "general" / "final"), character_tokenizer()

    first = rows(stage, tmp_path, policy=policy, cache=tmp_path / "dpo")
    again = rows(stage, tmp_path, policy=no_policy, cache=tmp_path / "dpo")
    assert asked == [1] and again == first
    # What the run of the conftest has sampled from the same policy.
    (mine,) = (tmp_path / "dpo").glob("generated-*.jsonl")
    assert mine.read_text() == (finished / "dpo" / mine.name).read_text()
    assert not list((tmp_path / "dpo").glob(".*"))


@pytest.mark.parametrize(
    "change",
    [
        {"generate": {"responses": 2, "max_new_tokens": 5, "batch_size": 48}},
        {"score": {"verifier": "exact"}},
        {"train": [tiny.task("general", "preference", 20, seed=1)]},
    ],
    ids=["generate", "score", "train"],
)
def test_other_settings_are_sampled_again(change: Any, finished: Path, tmp_path: Path) -> None:
    cache = finished / "dpo"
    assert rows(stages(tmp_path)["dpo"], tmp_path, policy=no_policy, cache=cache)
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo")["data"].update(change)
    stage = stages(tmp_path, recipe)["dpo"]
    with pytest.raises(AssertionError, match="the policy was asked for"):
        rows(stage, tmp_path, policy=no_policy, cache=cache)


def test_other_seeds_and_starts_are_sampled_again(finished: Path, tmp_path: Path) -> None:
    cache = finished / "dpo"
    with pytest.raises(AssertionError, match="the policy was asked for"):
        rows(stages(tmp_path)["dpo"], tmp_path, policy=no_policy, cache=cache, seed=4)
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.init", "code")
    with pytest.raises(AssertionError, match="the policy was asked for"):
        rows(stages(tmp_path, recipe)["dpo"], tmp_path, policy=no_policy, cache=cache)


def test_filters_pairs_and_rewards(tmp_path: Path) -> None:
    lines = [
        {"prompt": f"p{i} ", "chosen": "a", "rejected": "b", "chosen_reward": float(i),
         "rejected_reward": 0.0}
        for i in range(6)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tiny.tiny_recipe()
    data = {"train": [{"path": "pairs.jsonl"}], "filter": {"min_chosen_reward": 3.0}}
    for name in ("dpo", "rpo"):
        tiny.stage_of(recipe, name)["data"] = data
    found = stages(tmp_path, recipe)
    audit = Audit()
    assert [row["rewards"] for row in rows(found["rpo-1"], tmp_path, audit)] == [
        [3.0, 0.0], [4.0, 0.0], [5.0, 0.0],
    ]  # fmt: skip
    assert sum(entry["count"] for entry in audit.as_dict()["dropped"].values()) == 3
    for line in lines:
        del line["chosen_reward"], line["rejected_reward"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    del data["filter"]
    found = stages(tmp_path, recipe)
    assert len(rows(found["dpo"], tmp_path)) == 6
    with pytest.raises(DataError, match="reward"):
        rows(found["rpo-1"], tmp_path)


def test_held_out_examples(tmp_path: Path) -> None:
    found, tokenizer = stages(tmp_path), character_tokenizer()
    assert build_evaluation(found["general"], tmp_path, tokenizer, seed=3) is None
    held_out = build_evaluation(found["code"], tmp_path, tokenizer, seed=3)
    assert held_out is not None
    examples, held_rows, audit = held_out
    assert len(examples) == len(held_rows) == 8
    assert audit.as_dict()["kept"] == {"quickstart/code": 8}
    spec = tiny.load(
        tmp_path,
        {**tiny.tiny_recipe(), "eval": {"data": [tiny.task("code", "heldout", 9)], "max_rows": 4}},
    ).recipe.eval
    assert spec is not None
    assert len(evaluation_prompts(spec, tmp_path, seed=0)) == 4


def test_fingerprints_follow_tokens_masks_rewards_and_order(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path)
    stage = stages(tmp_path)["code"]
    tokenizer = load_tokenizer(loaded.recipe.model, tmp_path)
    train = tokenize_stage(stage, rows(stage, tmp_path), tokenizer, Audit())
    key = StageData(train, None, Audit(), []).fingerprint()
    assert key == dataset_fingerprint(train)
    assert key == dataset_fingerprint(train.map(lambda row: {"id": "other"}))
    assert key != dataset_fingerprint(train.select([1, 0, *range(2, len(train))]))
    assert key != dataset_fingerprint(train.select(range(1, len(train))))
    for column, value in (
        ("prompt_ids", [5]), ("response_ids", [[5]]), ("response_mask", [[0]]), ("rewards", [1.0])
    ):  # fmt: skip
        assert key != dataset_fingerprint(train.map(lambda row, c=column, v=value: {c: v}))


def test_digests_are_of_local_files_by_their_written_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    sources = [
        SourceSpec(path="a.jsonl"), SourceSpec(path="somebody/dataset"),
        SourceSpec(task="quickstart/code", size=1),
    ]  # fmt: skip
    first = source_digests(sources, tmp_path)
    assert list(first) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text("y")
    assert source_digests(sources, tmp_path) != first
