"""What may change between two starts, and what a run refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from rpo_trainer.chain import models as chain_models
from rpo_trainer.chain import run as chain_run
from rpo_trainer.chain import run_chain
from rpo_trainer.chain.run_dir import locked
from rpo_trainer.errors import DataError, ModelError, Problems, RunError
from rpo_trainer.stages.prepare import StagePreparer
from tests.chain import tiny
from tests.chain.killer import run_until
from tests.raising import raises

# --- what may change and what may not ---


def pairs_file(path: Path, shift: float = 0.0) -> Path:
    rows = [
        {"prompt": f"add {i} and 1: ", "chosen": str(i + 1), "rejected": str(i + 2),
         "chosen_reward": 5.0 + shift, "rejected_reward": 3.0}
        for i in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rpo_from_file(folder: Path) -> tiny.Recipe:
    """One RPO stage, from random weights, on a file."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs_file(folder / "pairs.jsonl")
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "rpo")
    stage.update(repeat=1, data={"train": [{"path": "pairs.jsonl"}]})
    recipe["stages"] = [stage]
    return recipe


def config_of(recipe: tiny.Recipe) -> dict[str, Any]:
    config: dict[str, Any] = recipe["model"]["from_config"]
    return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run has just begun its only stage."""
    folder = tmp_path_factory.mktemp("begun")
    run_until("step:rpo:0", lambda: tiny.run(folder, rpo_from_file(folder)))
    return folder


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda r: tiny.changed(r, "rpo.beta", 0.7), "stages.rpo.beta: 0.5 → 0.7"),
        (lambda r: tiny.changed(r, "seed", 4), "seed: 3 → 4"),
        (lambda r: tiny.changed(r, "rpo.learning_rate", 1e-4), "learning_rate: 0.001 → 0.0001"),
        (
            lambda r: tiny.changed(r, "rpo.loss_type", "rpo_sq"),
            'loss_type: "rpo_bwd_kl" → "rpo_sq"',
        ),
        (
            lambda r: tiny.changed(r, "model", {**r["model"], "dtype": "bfloat16"}),
            'model.dtype: "float32" → "bfloat16"',
        ),
        (
            lambda r: tiny.changed(
                r, "model", {**r["model"], "from_config": {**config_of(r), "hidden_size": 16}}
            ),
            "model.from_config.hidden_size: 32 → 16",
        ),
    ],
    ids=["beta", "seed", "learning_rate", "loss_type", "dtype", "model"],
)
def test_a_recipe_changed_after_the_start_is_refused(
    change: Callable[[tiny.Recipe], tiny.Recipe], shown: str, begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    before = tiny.content(tmp_path / "run")
    with raises("run.recipe-changed", RunError) as error:
        tiny.run(tmp_path, change(rpo_from_file(tmp_path)))
    assert shown in str(error.value)
    assert tiny.content(tmp_path / "run") == before


def test_data_changed_after_the_start_is_refused(tmp_path: Path) -> None:
    recipe = rpo_from_file(tmp_path)
    run_until("step:rpo:1", lambda: tiny.run(tmp_path, recipe))
    pairs_file(tmp_path / "pairs.jsonl", shift=1.0)
    with raises("run.input-changed", RunError) as error:
        tiny.run(tmp_path, recipe)
    assert "stages.rpo.data.train.0: pairs.jsonl" in error.value.what
    pairs_file(tmp_path / "pairs.jsonl")
    tiny.run(tmp_path, recipe)
    (tmp_path / "pairs.jsonl").write_text("x")  # of a finished stage too
    with raises("run.input-changed", RunError) as error:
        tiny.run(tmp_path, recipe)
    assert "stages.rpo.data.train.0: pairs.jsonl" in error.value.what


def test_examples_that_became_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rpo_from_file(tmp_path)
    run_until("step:rpo:1", lambda: tiny.run(tmp_path, recipe))
    shutil.rmtree(tmp_path / "run" / ".data")
    read = StagePreparer.rows
    monkeypatch.setattr(StagePreparer, "rows", lambda *a, **k: (read(*a, **k)[0][1:], None))
    with raises("run.data-changed", RunError) as error:
        tiny.run(tmp_path, recipe)
    assert "--allow-changed stages.rpo.data" in str(error.value.fix)


def test_safe_settings_may_change_within_a_stage(tmp_path: Path) -> None:
    recipe = rpo_from_file(tmp_path)
    straight = tiny.run(tmp_path / "straight", rpo_from_file(tmp_path / "straight"))
    run_until("step:rpo:1", lambda: tiny.run(tmp_path, recipe))
    new = tiny.changed(recipe, "eval", {"data": [tiny.task("general", "heldout", 4)]})
    tiny.stage_of(new, "rpo").update(
        micro_batch_size=2, gradient_checkpointing=True, logging_steps=2, save_steps=2,
        save_total_limit=4, eval_steps=1,
    )  # fmt: skip
    run_dir = tiny.run(tmp_path, new)
    expected = load_file(straight / "rpo" / "final" / "model.safetensors")
    for name, tensor in load_file(run_dir / "rpo" / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)
    assert {p.name for p in (run_dir / "rpo").glob("checkpoint-*")} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-3",
    }  # fmt: skip


def test_a_stage_added_to_a_finished_run_is_run(finished_copy: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    more = {**tiny.stage_of(recipe, "dpo"), "name": "more", "max_steps": 1}
    recipe["stages"].append(more)
    before = tiny.weights(finished_copy)
    tiny.run(tmp_path, recipe)
    after = tiny.weights(finished_copy)
    assert set(after) - set(before) == {"more"}
    assert tiny.records(finished_copy)["more"]["init"] == "rpo-2"


# --- refusals ---


def edit(final: Path) -> None:
    file = final / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def swap(final: Path) -> None:
    """The output of another stage, intact in itself."""
    shutil.rmtree(final)
    shutil.copytree(final.parents[1] / "code" / "final", final)


@pytest.mark.parametrize(
    ("harm", "shown"),
    [
        (edit, "model.safetensors"),
        (lambda final: (final / "config.json").unlink(), "config.json"),
        (shutil.rmtree, "manifest.json"),
        (swap, "weights"),
    ],
    ids=["edited", "file removed", "removed", "swapped"],
)
def test_a_finished_output_that_was_harmed_is_refused(
    harm: Callable[[Path], None], shown: str, finished_copy: Path, tmp_path: Path
) -> None:
    final = finished_copy / "general" / "final"
    harm(final)
    with raises("run.damaged-output", RunError, where=str(final)) as error:
        tiny.run(tmp_path)
    assert "general" in error.value.what and shown in error.value.what


def test_a_directory_that_cannot_be_used_is_refused_before_anything(tmp_path: Path) -> None:
    loaded = tiny.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with raises("run.not-a-directory", RunError, where=str(tmp_path / "file")):
        run_chain(loaded, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with raises("run.not-a-run-directory", RunError, where=str(tmp_path / "other")):
        run_chain(loaded, tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "chain.json").write_text("{")
    with raises("run.unreadable-state", RunError):
        run_chain(loaded, tmp_path / "broken")
    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy"), raises("run.locked", RunError) as error:
        run_chain(loaded, tmp_path / "busy")
    assert f"process {os.getpid()} on" in error.value.what
    for name in ("other", "broken", "busy"):
        assert not (tmp_path / name / "recipe.yaml").exists()


def test_faults_of_the_last_stage_are_found_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "rpo")["data"] = {"train": [{"path": "absent.jsonl"}]}
    monkeypatch.setattr(chain_models, "load_model", None)
    with raises("data.no-such-file", Problems) as error:
        tiny.run(tmp_path, recipe)
    assert "absent.jsonl: " in str(error.value)
    assert error.value.exit_code == DataError.exit_code
    assert not (tmp_path / "run" / "chain.json").exists()


def test_a_stage_alone_needs_what_it_starts_from(tmp_path: Path) -> None:
    for stage, field, source in (("dpo", "init", "general"), ("rpo-2", "init", "rpo-1")):
        with raises("run.stage-not-finished", RunError) as error:
            tiny.run(tmp_path, only={stage})
        for name in (field, stage, source):
            assert name in re.findall(r"[\w-]+", error.value.what)
        assert f"set stages.{stage}.{field} to" in str(error.value.fix)
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.init", "model")
    recipe = tiny.changed(recipe, "dpo.reference", "code")
    with raises("run.stage-not-finished", RunError) as error:
        tiny.run(tmp_path, recipe, only={"dpo"})
    assert "code" in error.value.what and "stages.dpo.reference" in str(error.value.fix)
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.init", "model")
    task = tiny.task("general", "heldout", 3)
    recipe["eval"] = {
        "data": [task], "generate": {"responses": 1, "max_new_tokens": 3},
        "score": {"verifier": "partial_match"}, "baseline": "general",
    }  # fmt: skip
    with raises("run.stage-not-finished", RunError) as error:
        tiny.run(tmp_path, recipe, only={"dpo"})
    assert "general" in error.value.what and "set eval.baseline to" in str(error.value.fix)
    # The stage has not begun: its recipe may still be changed, as the message says.
    assert not (tmp_path / "run" / "dpo").exists()
    assert "dpo" not in str(tiny.content(tmp_path / "run"))


def test_a_stage_run_alone_is_part_of_the_chain_afterwards(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "general")["init"] = "model"
    recipe["stages"] = recipe["stages"][:2]
    run_dir = tiny.run(tmp_path, recipe, only={"general"})
    assert {n: r["state"] for n, r in tiny.records(run_dir).items()} == {
        "code": "pending", "general": "done",
    }  # fmt: skip
    before = tiny.content(run_dir / "general")
    tiny.run(tmp_path, recipe)
    assert tiny.records(run_dir)["code"]["state"] == "done"
    assert tiny.content(run_dir / "general") == before


def test_an_init_path_without_a_model_or_with_another_vocabulary_is_refused(
    finished: Path, tmp_path: Path
) -> None:
    recipe = rpo_from_file(tmp_path)
    with pytest.raises(Problems) as error:
        tiny.run(tmp_path, tiny.changed(recipe, "rpo.init", "./nowhere"))
    (problem,) = error.value.problems
    assert type(problem) is ModelError and problem.code == "model.not-found"
    assert str(tmp_path / "nowhere") in str(problem.where)
    small = AutoModelForCausalLM.from_pretrained(finished / "code" / "final")
    small.resize_token_embeddings(50)
    small.save_pretrained(tmp_path / "small")
    with raises("tokenizer.too-many-tokens", Problems) as error:
        tiny.run(tmp_path, tiny.changed(recipe, "rpo.init", "./small"))
    assert "100 tokens" in str(error.value) and "50 embeddings" in str(error.value)


# --- stopping early otherwise ---


class _StopEarly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_training_that_ends_too_early_is_no_finished_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = rpo_from_file(tmp_path)
    make = chain_run.make_trainer

    def short(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(_StopEarly())
        return trainer

    monkeypatch.setattr(chain_run, "make_trainer", short)
    with raises("training.ended-early", RunError, where=str(tmp_path / "run" / "rpo")):
        tiny.run(tmp_path, recipe)
    assert not (tmp_path / "run" / "rpo" / "final").exists()
