"""Rows of a stage: their sources, and when they are computed again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.data import Audit
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError
from rpo_trainer.models.loading import load_weights
from rpo_trainer.recipe import Recipe, Stage, expand_stages
from rpo_trainer.runtime import row_progress
from rpo_trainer.stages.inputs import (
    HeldOut,
    at_most,
    dataset_fingerprint,
    fitted_stage,
    held_out_prompts,
    needs_policy,
    set_aside,
    stage_seed,
    tokenize_stage,
)
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.scored_rows import ScoredRows
from tests.chain import tiny
from tests.raising import raises


def stages(folder: Path, recipe: tiny.Recipe | None = None) -> dict[str, Stage]:
    return {s.name: s for s in expand_stages(tiny.load(folder, recipe).recipe)}


def preparer(folder: Path, found: dict[str, Stage] | None = None) -> StagePreparer:
    """The stages of the recipe in the directory, or other stages with its model."""
    made = StagePreparer(tiny.load(folder))
    made.stages = made.stages if found is None else list(found.values())
    return made


def rows(stage: Stage, folder: Path, audit: Audit | None = None, **more: Any) -> list[Any]:
    return preparer(folder).rows(stage, audit or Audit(), **more)[0]


def made(
    found: dict[str, Stage],
    name: str,
    folder: Path,
    *,
    policy: Any,
    run: Path | None = None,
    weights: Any = lambda source: "weights",
    seed: int = 3,
) -> list[Any]:
    """The rows of a stage whose responses are generated in the run."""
    of_run = preparer(folder, found)
    of_run.recipe = of_run.recipe.model_copy(update={"seed": seed})
    policies: Any = SimpleNamespace(sampling_policy=policy, weights_key=weights)
    scored = ScoredRows(of_run, run or folder, policies)
    stage = found[name]
    found_rows = scored.rows(stage)
    return of_run.rows(stage, Audit(), None if found_rows is None else found_rows.rows)[0]


def no_policy(*_: Any) -> Any:
    raise AssertionError("the policy was asked for")


def test_the_stages_own_seed_comes_first(tmp_path: Path) -> None:
    recipe: Recipe = tiny.load(tmp_path, tiny.changed(tiny.tiny_recipe(), "dpo.seed", 8)).recipe
    found = {s.name: stage_seed(s, recipe) for s in expand_stages(recipe)}
    assert found == {"code": 3, "general": 3, "dpo": 8, "rpo-1": 3, "rpo-2": 3}


def test_replay_takes_rows_of_the_earlier_stage(tmp_path: Path) -> None:
    found = stages(tmp_path)
    mixed = rows(found["general"], tmp_path)
    code = {row["id"] for row in rows(found["code"], tmp_path)}
    assert len(mixed) == 44 and sum(row["id"] in code for row in mixed) == 4


def test_responses_are_sampled_once_and_read_again(finished: Path, tmp_path: Path) -> None:
    found = stages(tmp_path)
    assert needs_policy(found["dpo"].data) and not needs_policy(found["code"].data)
    asked = []

    def policy(stage: Stage, source: str) -> Any:
        asked.append((stage.name, source))
        return load_weights(finished / "general" / "final"), character_tokenizer()

    first = made(found, "dpo", tmp_path, policy=policy)
    again = made(found, "dpo", tmp_path, policy=no_policy)
    assert asked == [("dpo", "init")] and again == first
    # The run of the conftest sampled them from the same policy.
    (mine,) = (tmp_path / "dpo").glob("generated-*.jsonl")
    (theirs,) = (finished / "dpo").glob("generated-*.jsonl")
    assert mine.read_text() == theirs.read_text()
    assert (
        len(list((tmp_path / "dpo").glob("*.jsonl"))) == 2
    )  # the responses, and those with rewards


@pytest.fixture
def sampled(finished: Path, tmp_path: Path) -> Path:
    """A run whose stage dpo has sampled its responses."""

    def policy(stage: Stage, source: str) -> Any:
        return load_weights(finished / "general" / "final"), character_tokenizer()

    made(stages(tmp_path), "dpo", tmp_path, policy=policy)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"generate": {"responses": 2, "max_new_tokens": 5, "batch_size": 48}},
        {"train": [tiny.task("general", "preference", 20, seed=1)]},
    ],
    ids=["generate", "train"],
)
def test_other_settings_are_sampled_again(change: Any, sampled: Path) -> None:
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo")["data"].update(change)
    with pytest.raises(AssertionError, match="the policy was asked for"):
        made(stages(sampled, recipe), "dpo", sampled, policy=no_policy)


def test_other_seeds_and_weights_are_sampled_again(sampled: Path) -> None:
    found = stages(sampled)
    assert made(found, "dpo", sampled, policy=no_policy)
    with pytest.raises(AssertionError, match="the policy was asked for"):
        made(found, "dpo", sampled, policy=no_policy, seed=4)
    with pytest.raises(AssertionError, match="the policy was asked for"):
        made(found, "dpo", sampled, policy=no_policy, weights=lambda *_: "others")


def test_another_scorer_scores_the_same_responses(sampled: Path) -> None:
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo")["data"]["score"] = {"verifier": "exact"}
    made(stages(sampled, recipe), "dpo", sampled, policy=no_policy)
    files = [p.name.split("-")[0] for p in (sampled / "dpo").glob("*.jsonl")]
    assert sorted(files) == ["generated", "generated", "responses"]


def test_repeated_prompts_left_out_are_other_rows_and_other_files(
    finished: Path, tmp_path: Path
) -> None:
    """Sampled and scored rows are not reused under another setting."""

    def policy(stage: Stage, source: str) -> Any:
        return load_weights(finished / "general" / "final"), character_tokenizer()

    given = [
        {"id": f"r{i}", "prompt": f"{p}: ", "responses": ["a", "b"], "ground_truth": "a"}
        for i, p in enumerate(["x", "X", "x"])
    ]
    path = tmp_path / "rows.jsonl"
    for name, sampled_file in (("dpo", True), ("rpo", False)):
        lines = [{k: v for k, v in r.items() if k != "responses"} for r in given]
        path.write_text("".join(json.dumps(r) + "\n" for r in (lines if sampled_file else given)))
        counts = {}
        for dedup in (None, "exact", "normalized", None):
            recipe = tiny.tiny_recipe()
            data = tiny.stage_of(recipe, name)["data"]
            data |= {"train": [{"path": "rows.jsonl"}], "dedup": dedup}
            if not sampled_file:
                del data["generate"]
            found = stages(tmp_path, recipe)
            stage = found["dpo" if sampled_file else "rpo-1"]
            policies: Any = SimpleNamespace(sampling_policy=policy, weights_key=lambda _: "weights")
            own = ScoredRows(preparer(tmp_path, found), tmp_path, policies).rows(stage)
            assert own is not None
            counts.setdefault(dedup, []).append([row["id"] for row in own.rows])
        assert counts == {
            None: [["r0", "r1", "r2"]] * 2, "exact": [["r0", "r1"]], "normalized": [["r0"]],
        }  # fmt: skip
        kind = "generated" if sampled_file else "scored"
        assert len(list((tmp_path / stage.name).glob(f"{kind}-*.jsonl"))) == 3


def test_rows_of_takes_the_scored_responses_of_another_stage(sampled: Path) -> None:
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "rpo")
    stage["data"] = {"responses_from": "dpo", "pairs": {"select": "all_responses"}}
    found = stages(sampled, recipe)
    taken = made(found, "rpo-2", sampled, policy=no_policy)
    (file,) = (sampled / "dpo").glob("generated-*.jsonl")
    scored = {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert taken and all(
        set(row["responses"]) <= set(scored[row["id"]]["responses"]) for row in taken
    )
    assert any(len(row["responses"]) == 3 for row in taken)


def test_rounds_sample_again_or_never(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(row_progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(row_progress, "_REDRAWN", 0.0)
    caplog.set_level("INFO", "rpo_trainer")

    def policy(stage: Stage, source: str) -> Any:
        asked.append(stage.name)
        return load_weights(finished / "general" / "final"), character_tokenizer()

    for resample, sampling in (("once", ["rpo-1"]), ("every_round", ["rpo-1", "rpo-2"])):
        asked: list[str] = []
        recipe = tiny.tiny_recipe()
        tiny.stage_of(recipe, "rpo")["data"]["resample"] = resample
        found = stages(tmp_path, recipe)
        rounds = [
            made(found, name, tmp_path, policy=policy, run=tmp_path / resample)
            for name in ("rpo-1", "rpo-2")
        ]
        assert asked == sampling
        # The second round of `each` draws other random numbers, here from the same policy.
        assert (rounds[0] == rounds[1]) == (resample == "once")
    for work in ("[4/5 rpo-1] sampled: 48 of 48 rows", "[5/5 rpo-2] scored: 48 of 48 rows"):
        assert any(message.startswith(work) for message in caplog.messages)


def test_given_responses_are_scored_and_kept(tmp_path: Path) -> None:
    lines = [
        {"prompt": f"{n} + 1 = ", "ground_truth": str(n + 1), "responses": [str(n), f"#### {n + 1}"],
         "rewards": [7, 7]}
        for n in range(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tiny.tiny_recipe()
    data = {"train": [{"path": "rows.jsonl"}], "score": {"verifier": "numeric"}}
    tiny.stage_of(recipe, "dpo")["data"] = data
    found = stages(tmp_path, recipe)
    mine = made(found, "dpo", tmp_path, policy=no_policy)
    assert [row["responses"][0] for row in mine] == [f"#### {n + 1}" for n in range(4)]
    assert mine == rows(found["dpo"], tmp_path)  # what `check` and `plan` read
    assert [p.name.split("-")[0] for p in (tmp_path / "dpo").glob("*.jsonl")] == ["scored"]


def rpo_on(lines: list[Any], folder: Path, **data: Any) -> tuple[Stage, Audit, list[Any]]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tiny.changed(tiny.tiny_recipe(), "rpo.reward_scale", "auto")
    tiny.stage_of(recipe, "rpo")["data"] = {"train": [{"path": "rows.jsonl"}], **data}
    stage, audit = stages(folder, recipe)["rpo-1"], Audit()
    return stage, audit, rows(stage, folder, audit)


def test_reward_scale_auto_is_fitted_to_the_gaps(tmp_path: Path) -> None:
    scales = {}
    for unit in (1.0, 100.0):
        lines = [
            {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "chosen_reward": unit * (i % 3 + 1),
             "rejected_reward": 0.0}
            for i in range(9)
        ]  # fmt: skip
        stage, audit, _ = rpo_on(lines, tmp_path)
        assert audit.calibration["method"] == "quantile"
        fitted = fitted_stage(stage, audit)
        scales[unit] = fitted.reward_scale
        assert stage.reward_scale == "auto"
        assert any("reward_scale" in line for line in audit.summary_lines())
    assert scales[1.0] == pytest.approx(math.log(9) / 2, rel=1e-3)  # the median gap is 2
    assert scales[100.0] == pytest.approx(scales[1.0] / 100)


def test_reward_scale_auto_follows_labels_that_go_against_the_rewards(tmp_path: Path) -> None:
    lines = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b",
         "chosen_reward": 2.0 if i % 4 else 0.0, "rejected_reward": 0.0 if i % 4 else 2.0}
        for i in range(40)
    ]  # fmt: skip
    _, audit, kept = rpo_on(lines, tmp_path, filter={"reversed": "drop"})
    assert len(kept) == 30  # labels are read before the filter
    assert audit.calibration["method"] == "labels"
    assert audit.calibration["reward_scale"] == pytest.approx(math.log(3) / 2, rel=1e-3)


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


def held_out_of(stage: Stage, folder: Path) -> HeldOut | None:
    return preparer(folder).prepare(stage).held_out


def test_held_out_examples(tmp_path: Path) -> None:
    found = stages(tmp_path)
    assert held_out_of(found["general"], tmp_path) is None
    held_out = held_out_of(found["code"], tmp_path)
    assert held_out is not None
    assert len(held_out.examples) == 8
    assert held_out.audit.as_dict()["kept"] == {"quickstart/code": 8}
    spec = tiny.load(
        tmp_path,
        {**tiny.tiny_recipe(), "eval": {"data": [tiny.task("code", "heldout", 9)], "max_rows": 4}},
    ).recipe.eval
    assert spec is not None
    assert len(preparer(tmp_path).evaluation_rows(spec, "data")) == 4


def test_fingerprints_follow_tokens_masks_rewards_and_order(tmp_path: Path) -> None:
    stage = stages(tmp_path)["code"]
    train = tokenize_stage(stage, rows(stage, tmp_path), preparer(tmp_path).tokenizer, Audit())
    key = preparer(tmp_path).prepare(stage).fingerprint
    assert key == dataset_fingerprint(train)
    assert key == dataset_fingerprint(train.map(lambda row: {"id": "other"}))
    assert key != dataset_fingerprint(train.select([1, 0, *range(2, len(train))]))
    assert key != dataset_fingerprint(train.select(range(1, len(train))))
    for column, value in (
        ("prompt_ids", [5]), ("response_ids", [[5]]), ("response_mask", [[0]]), ("rewards", [1.0])
    ):  # fmt: skip
        assert key != dataset_fingerprint(train.map(lambda row, c=column, v=value: {c: v}))


@pytest.mark.parametrize("policy", ["keep", "drop", None])
def test_reversed_pairs_get_in_held_out_rows_what_the_filter_says(
    policy: str | None, tmp_path: Path
) -> None:
    lines = [
        {"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i}!",
         "chosen_reward": 1.0 if i else 0.0, "rejected_reward": 0.5}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tiny.tiny_recipe()
    best = {"prompt": "0 + 0 = ", "chosen": "0", "rejected": "1", "chosen_reward": 99.0,
            "rejected_reward": 0.0}  # fmt: skip
    (tmp_path / "train.jsonl").write_text(json.dumps(best) + "\n")
    data: dict[str, Any] = {"train": [{"path": "train.jsonl"}], "eval": [{"path": "held.jsonl"}]}
    if policy is not None:  # the threshold applies to training rows
        data["filter"] = {"reversed": policy, "min_chosen_reward": 99.0}
    tiny.stage_of(recipe, "dpo")["data"] = data
    stage = stages(tmp_path, recipe)["dpo"]

    def held_out() -> tuple[int, Audit]:
        found = held_out_of(stage, tmp_path)
        assert found is not None
        return len(found.examples), found.audit

    if policy is None:
        with raises("data.reversed-pairs", DataError) as error:
            held_out()
        assert "1 of 4" in error.value.what
        return
    kept, audit = held_out()
    assert kept == (4 if policy == "keep" else 3)
    assert ("reversed" in audit.dropped) == (policy == "drop")


@pytest.mark.parametrize(("limit", "kept"), [(None, 10), (10, 10), (4, 4), (1, 1)])
def test_a_limited_evaluation_has_its_share_of_each_source(limit: int | None, kept: int) -> None:
    rows = [{"id": str(i), "source": "a" if i < 5 else "b"} for i in range(10)]
    audit = Audit()
    found = at_most(rows, limit, audit)
    assert sum(audit.left_out.get("eval_max_rows", {}).values()) == 10 - kept
    assert len(found) == kept and [int(r["id"]) for r in found] == sorted(
        int(r["id"]) for r in found
    )
    if kept > 1:
        assert sum(row["source"] == "b" for row in found) == kept // 2


def test_rows_that_are_held_out_are_not_of_the_training_rows() -> None:
    rows = [{"id": str(i), "source": "a", "prompt": str(i)} for i in range(10)]
    stage: Any = SimpleNamespace(data=SimpleNamespace(eval_fraction=0.3))
    audit = Audit()
    audit.add_read("a", 10)
    train, held = set_aside(rows, held_out_prompts(stage, rows, seed=0), audit)
    assert held is not None and (len(train), len(held), audit.rows()) == (7, 3, 7)
