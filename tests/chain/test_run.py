"""The chain: initial models of stages, contents of the run directory, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_trainer.chain import default_run_dir, run_chain, select_stage
from rpo_trainer.chain import run as chain_run
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import expand_stages, load_recipe
from rpo_trainer.trainers.checkpoint import verify_manifest
from tests.chain import tiny
from tests.chain.killer import run_until
from tests.raising import raises

# --- the chain itself ---


def test_each_stage_starts_from_the_one_before_and_has_it_as_reference(finished: Path) -> None:
    records = tiny.records(finished)
    assert tuple(records) == tiny.STAGES
    starts = ["model", "code", "general", "dpo", "rpo-1"]
    assert [records[name]["init"] for name in tiny.STAGES] == starts
    assert [records[n]["reference"] for n in tiny.STAGES] == [None, None, *starts[2:]]
    for name in tiny.STAGES[2:]:
        check = records[name]["step0"]
        assert check["ok"] and check["nats_per_token"] < 1e-5
        assert check["loss"] == pytest.approx(check["expected"], abs=1e-6)
    assert records["dpo"]["step0"]["expected"] == pytest.approx(math.log(2))
    assert len(set(tiny.weights(finished).values())) == len(tiny.STAGES)


def test_the_weights_a_trainer_gets_are_those_of_the_stage_before(
    finished: Path, prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = prefix(tmp_path, "dpo")
    seen: dict[str, Any] = {}
    make = chain_run.make_trainer

    def spy(stage: Any, config: Any, model: Any, reference: Any, *args: Any) -> Any:
        seen["reference"] = reference
        seen["weights"] = {k: v.clone() for k, v in model.state_dict().items()}
        return make(stage, config, model, reference, *args)

    monkeypatch.setattr(chain_run, "make_trainer", spy)
    tiny.run(tmp_path, only={"dpo"})
    before = load_file(finished / "general" / "final" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(seen["weights"][name], tensor)
    assert seen["reference"] is None  # the initial policy itself
    assert tiny.weights(run_dir)["dpo"] != tiny.weights(run_dir)["general"]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Policy and reference that `make_trainer` receives: (weights, weights or None)."""
    calls: list[Any] = []
    make = chain_run.make_trainer

    def copy(model: Any) -> Any:
        return None if model is None else {k: v.clone() for k, v in model.state_dict().items()}

    def spy(stage: Any, config: Any, model: Any, reference: Any, *args: Any) -> Any:
        calls.append((copy(model), copy(reference)))
        return make(stage, config, model, reference, *args)

    monkeypatch.setattr(chain_run, "make_trainer", spy)
    return calls


def same(weights: dict[str, Any], final: Path) -> bool:
    stored = load_file(final / "model.safetensors")
    return all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


def test_init_and_reference_can_be_an_earlier_stage_or_a_path(
    finished: Path, prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.tiny_recipe()
    shutil.copytree(finished / "general" / "final", tmp_path / "elsewhere")
    tiny.stage_of(recipe, "rpo").update(repeat=1, init="./elsewhere", reference="code")
    run_dir = prefix(tmp_path, "rpo-1")
    calls = spied(monkeypatch)
    state = json.loads((run_dir / "chain.json").read_text())
    state.pop("digest", None)
    state["stages"] = [r for r in state["stages"] if r["state"] == "done"]
    (run_dir / "chain.json").write_text(json.dumps(state))
    tiny.run(tmp_path, recipe)
    ((policy, reference),) = calls
    assert same(policy, finished / "general" / "final")
    assert same(reference, finished / "code" / "final")
    record = tiny.records(run_dir)["rpo"]
    assert (record["init"], record["reference"]) == ("./elsewhere", "code")
    assert "step0" not in record  # policy ≠ reference: there is no constant to check


def test_init_model_starts_from_the_recipes_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.tiny_recipe()
    del tiny.stage_of(recipe, "general")["data"]["replay"]
    tiny.stage_of(recipe, "general")["init"] = "model"
    recipe["stages"] = recipe["stages"][:2]
    calls = spied(monkeypatch)
    tiny.run(tmp_path, recipe)
    (first, _), (second, _) = calls
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_explicit_reference_that_equals_init_is_the_policy_itself(
    prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix(tmp_path, "dpo")
    calls = spied(monkeypatch)
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.reference", "previous")
    tiny.run(tmp_path, recipe, only={"dpo"})
    assert calls[0][1] is None
    assert tiny.records(tmp_path / "run")["dpo"]["step0"]["ok"]


def test_replay_brings_rows_of_the_earlier_stage(finished: Path) -> None:
    record = tiny.records(finished)["general"]
    assert record["data"]["audit"]["replay"]["rows"] == 4
    assert record["examples"] == 44


def test_responses_are_sampled_from_the_policy_that_seeds_the_stage(finished: Path) -> None:
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.rewards.policies import row_keys
    from rpo_trainer.rewards.sample import sample_responses

    (file,) = (finished / "rpo-2").glob("generated-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(finished / "rpo-1" / "final")
    keys = row_keys(rows, "rpo-2/")
    again = sample_responses(
        model, character_tokenizer(), [row["prompt"] for row in rows], responses=3,
        max_new_tokens=5, batch_size=48, seed=3, keys=keys,
    )  # fmt: skip
    assert [row["responses"] for row in rows] == [[s.text for s in each] for each in again]
    other = AutoModelForCausalLM.from_pretrained(finished / "code" / "final")
    different = sample_responses(
        other, character_tokenizer(), [row["prompt"] for row in rows], responses=3,
        max_new_tokens=5, batch_size=48, seed=3, keys=keys,
    )  # fmt: skip
    assert different != again


def test_run_again_is_done_and_rewrites_nothing(
    finished_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = tiny.content(finished_copy)
    assert tiny.run(tmp_path) == finished_copy
    assert tiny.content(finished_copy) == before
    told = [r for r in caplog.records if r.name == "rpo_trainer.chain.run"]
    assert [r.levelname for r in told] == ["INFO"] and str(finished_copy) in told[0].getMessage()


def test_a_moved_run_goes_on(finished: Path, prefix: Any, tmp_path: Path) -> None:
    prefix(tmp_path / "here", "rpo-1")
    run_until("step:rpo-1:2", lambda: tiny.run(tmp_path / "here", only={"rpo-1"}))
    shutil.move(tmp_path / "here", tmp_path / "there" / "deep")
    tiny.run(tmp_path / "there" / "deep")
    run_dir = tmp_path / "there" / "deep" / "run"
    assert tiny.weights(run_dir) == tiny.weights(finished)
    before = tiny.content(run_dir)
    shutil.move(run_dir, tmp_path / "last")
    run_chain(load_recipe(tmp_path / "there" / "deep" / "recipe.yaml"), tmp_path / "last")
    assert tiny.content(tmp_path / "last") == before


# --- the run directory ---


def test_the_run_directory_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {"recipe.yaml", "chain.json", "metrics.jsonl", "reference-cache", *tiny.STAGES}
    for stage in tiny.STAGES:
        final = finished / stage / "final"
        assert verify_manifest(final) is None
        listed = set(json.loads((final / "manifest.json").read_text())["files"])
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= listed
        assert listed == {p.name for p in final.iterdir()} - {"manifest.json"}
        assert not list(final.glob("*.bin"))  # no pickles
        assert [p.name for p in (finished / stage).glob("checkpoint-*")] == [
            f"checkpoint-{tiny.records(finished)[stage]['steps']}"
        ]


def test_no_file_names_a_place(finished: Path) -> None:
    suspects = [str(finished), str(finished.parent), str(Path.cwd()), str(Path.home()), "/tmp/"]
    for path in finished.rglob("*"):
        if not path.is_file() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".arrow"):
            continue
        if path.name == "adapter_config.json":
            continue  # PEFT only finds the base by its absolute path
        text = path.read_text()
        for suspect in suspects:
            assert suspect not in text, f"{suspect} in {path.relative_to(finished)}"


def test_outputs_load_with_transformers(finished: Path) -> None:
    final = finished / "rpo-2" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer("reverse abc: ", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    assert model(**ids).logits.shape == (1, ids["input_ids"].shape[1], 100)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_recipe_kept_is_a_recipe_again(finished: Path, tmp_path: Path) -> None:
    text = (finished / "recipe.yaml").read_text()
    assert re.search(r"^# torch \d", text, re.MULTILINE)
    assert re.search(r"^# transformers \d", text, re.MULTILINE)
    again = load_recipe(finished / "recipe.yaml")
    assert expand_stages(again.recipe) == expand_stages(tiny.load(tmp_path).recipe)


def test_metrics_hold_every_step_of_every_stage_once(finished: Path) -> None:
    for stage in tiny.STAGES:
        last = tiny.SFT_STEPS if stage in ("code", "general") else tiny.PREFERENCE_STEPS
        expected = [(step, False) for step in range(1, last + 1)]
        if stage == "code":  # held-out examples, before and after training
            expected = [(0, True), *expected, (last, True)]
        assert tiny.metric_steps(finished, stage) == expected
    rpo = [m for m in tiny.metrics(finished) if m["stage"] == "rpo-2"]
    assert all({"loss", "rewards/margins", "rewards/target_gap", "loss/sft"} <= set(m) for m in rpo)


def test_the_state_says_what_was_done(finished: Path) -> None:
    record = tiny.records(finished)["code"]
    assert record["state"] == "done" and record["seconds"] > 0
    assert record["started"] <= record["finished"]
    assert record["examples"] == 40 and record["steps"] == tiny.SFT_STEPS
    assert record["eval"]["nll"] < record["eval"]["nll_before"]
    assert record["output"]["fingerprint"] == tiny.weights(finished)["code"][:16]
    gaps = [json.loads(x) for x in (finished / "rpo-1" / "gaps.jsonl").read_text().splitlines()]
    assert len(gaps) == tiny.records(finished)["rpo-1"]["examples"]
    assert set(gaps[0]) == {"id", "implicit_gap", "target_gap"}


def test_scores_and_samples_are_kept_where_asked_for(finished: Path, prefix: Any, tmp_path: Path):
    recipe = tiny.tiny_recipe()
    recipe["eval"] = {
        "data": [tiny.task("general", "heldout", 6)],
        "generate": {"responses": 2, "max_new_tokens": 5},
        "score": {"verifier": "partial_match"},
    }
    run_dir = prefix(tmp_path, "rpo-2")
    tiny.run(tmp_path, recipe)
    record = tiny.records(run_dir)["rpo-2"]
    assert record["eval"]["prompts"] == 6 and record["eval"]["responses"] == 12
    assert 0 <= record["eval"]["reward_mean"] <= 5
    assert len((run_dir / "rpo-2" / "samples.jsonl").read_text().splitlines()) == 6
    assert tiny.weights(run_dir) == tiny.weights(finished)  # evaluation changes nothing


# --- choosing a stage, naming a run ---


def test_select_stage(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path)
    assert select_stage(loaded, "dpo", None) == "dpo"
    assert select_stage(loaded, "sft", "general") == "general"
    assert select_stage(loaded, "rpo", "rpo-2") == "rpo-2"
    with raises("option.ambiguous-stage", RecipeError, where=str(loaded.path)) as error:
        select_stage(loaded, "sft", None)
    assert "--stage: code, general" in str(error.value)
    with raises("option.unknown-stage", RecipeError, where=str(loaded.path)) as error:
        select_stage(loaded, "dpo", "general")
    assert "'general'" in error.value.what and str(error.value.fix).endswith(": dpo")
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:1]
    for name in (None, "x"):
        with raises("option.no-stage-of-kind", RecipeError):
            select_stage(tiny.load(tmp_path, recipe), "rpo", name)


def test_default_run_dir(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "mine", tiny.tiny_recipe())
    assert default_run_dir(load_recipe(path)) == Path("runs/recipe")
    chain = path.rename(path.with_name("chain.yaml"))
    assert default_run_dir(load_recipe(chain)) == Path("runs/mine")
    assert default_run_dir(load_recipe(chain, ["run_dir=~/x"])) == Path.home() / "x"


# --- LoRA ---


def test_an_adapter_is_merged_kept_and_the_next_stage_starts_from_the_merged(
    prefix: Any, tmp_path: Path
) -> None:
    recipe = tiny.tiny_recipe()
    peft = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    for name in ("dpo", "rpo"):
        tiny.stage_of(recipe, name).update(peft=peft, learning_rate=1e-2)
    run_dir = prefix(tmp_path, "dpo")
    run_until("step:rpo-1:2", lambda: tiny.run(tmp_path, recipe))
    tiny.run(tmp_path, recipe)
    records = tiny.records(run_dir)
    for name in ("dpo", "rpo-1", "rpo-2"):
        assert records[name]["step0"]["ok"] and records[name]["step0"]["nats_per_token"] < 1e-5
        files = {p.name for p in (run_dir / name / "adapter").iterdir()}
        assert files == {
            "adapter_config.json", "adapter_model.safetensors", "adapter_base.json",
        }  # fmt: skip
        assert not [p for p in (run_dir / name / "final").iterdir() if "adapter" in p.name]
    base = AutoModelForCausalLM.from_pretrained(run_dir / "general" / "final")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "dpo" / "final")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, run_dir / "dpo" / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        with adapted.disable_adapter():
            before = adapted(ids).logits
        after = adapted(ids).logits
        assert (after - merged(ids).logits).abs().max() < 1e-5
        assert (after - before).abs().max() > 1e-3
    test_no_file_names_a_place(run_dir)
    prefix(tmp_path / "straight", "dpo")
    straight = tiny.run(tmp_path / "straight", recipe)
    assert tiny.weights(straight) == tiny.weights(run_dir)
