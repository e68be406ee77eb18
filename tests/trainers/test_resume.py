"""Killed and resumed, a run is bitwise the uninterrupted one; checkpoints are complete or absent."""

from __future__ import annotations

import copy
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rpo_trainer.errors import RunError
from rpo_trainer.trainers import checkpoint
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import assert_bitwise_equal, make_rows

STEPS = 8  # ten rows in batches of four: epochs of three steps, the last of which has two rows
_PROCESSES = itertools.count()


class Killed(Exception):
    pass


class KillBefore(TrainerCallback):
    """Simulate the end of the process when step `step` is saved and the next one begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def starts() -> dict[str, Any]:
    """SFT's model has dropout, so that the random state matters."""
    noisy = make_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return {"sft": noisy, "rpo": make_model(), "lora": make_model()}


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "sft":
        return make_rows(0, (1,) * 10, spans=True)
    return make_rows(0, (2, 3, 2, 5, 2, 2, 3, 2, 4, 2), rewards=True)


@pytest.fixture
def trainer_of(make_trainer, starts, tmp_path):
    def make(kind: str, out: str, **settings: Any) -> Any:
        if kind == "lora":
            from peft import LoraConfig

            torch.manual_seed(next(_PROCESSES))  # processes do not start equal
            settings["peft_config"] = LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.1)
            kind_of_trainer, model = "rpo", starts["lora"]
        else:
            kind_of_trainer, model = kind, starts[kind]
        return make_trainer(
            kind_of_trainer, copy.deepcopy(model), rows_of(kind),
            **{
                "output_dir": str(tmp_path / out), "max_steps": STEPS, "global_batch_size": 4,
                "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
                "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 1.0,
                "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
                "logging_strategy": "steps", "logging_steps": 2, **settings,
            },
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def straight_models() -> dict[str, Any]:
    return {}


def straight(kind: str, trainer_of: Any, models: dict[str, Any]) -> Any:
    """The uninterrupted run."""
    if kind not in models:
        trainer = trainer_of(kind, f"straight-{kind}")
        trainer.train()
        assert trainer.state.global_step == STEPS
        models[kind] = trainer.model
    return models[kind]


def kill(trainer: Any, step: int) -> None:
    trainer.add_callback(KillBefore(step))
    with pytest.raises(Killed):
        trainer.train()


# Within the first epoch, at its end, within the second, at its end, within the third.
@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("kind", ["sft", "rpo", "lora"])
def test_killed_and_resumed_is_bitwise_the_straight_run(kind, step, trainer_of, straight_models):
    expected = straight(kind, trainer_of, straight_models)
    kill(trainer_of(kind, "out"), step)
    resumed = trainer_of(kind, "out")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_bitwise_equal(resumed.model, expected)


@pytest.mark.parametrize("kind", ["sft", "rpo", "lora"])
def test_and_with_checkpoints_written_in_the_background(
    kind, trainer_of, straight_models, tmp_path
):
    expected = straight(kind, trainer_of, straight_models)
    kill(trainer_of(kind, "out", async_save=True), 4)
    assert checkpoint.last_complete(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"
    resumed = trainer_of(kind, "out", async_save=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_bitwise_equal(resumed.model, expected)


def test_the_intervals_asked_for_now_count(trainer_of):
    kill(trainer_of("sft", "out"), 2)  # logged every second step, saved at each
    resumed = trainer_of("sft", "out", logging_steps=3, save_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [2, 3, 6]
    assert resumed.state.save_steps == 5


def test_killed_twice(trainer_of, straight_models):
    expected = straight("rpo", trainer_of, straight_models)
    kill(trainer_of("rpo", "out"), 2)
    again = trainer_of("rpo", "out", callbacks=[KillBefore(5)])
    with pytest.raises(Killed):
        again.train(resume_from_checkpoint=True)
    last = trainer_of("rpo", "out")
    last.train(resume_from_checkpoint=True)
    assert_bitwise_equal(last.model, expected)


def test_loader_workers_resume_alike(trainer_of, straight_models):
    expected = straight("rpo", trainer_of, straight_models)
    kill(trainer_of("rpo", "out", dataloader_num_workers=1), 4)
    resumed = trainer_of("rpo", "out", dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(resumed.model, expected)


def test_a_named_checkpoint_is_resumed_from(trainer_of, straight_models, tmp_path):
    expected = straight("rpo", trainer_of, straight_models)
    kill(trainer_of("rpo", "out"), 4)
    resumed = trainer_of("rpo", "elsewhere")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_bitwise_equal(resumed.model, expected)


def cut(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 100)


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unfinished(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def garbage(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text("[1, 2")


@pytest.mark.parametrize("harm", [cut, remove, unfinished, garbage])
def test_a_damaged_newest_checkpoint_is_passed_over(
    harm, trainer_of, straight_models, tmp_path, caplog
):
    expected = straight("rpo", trainer_of, straight_models)
    kill(trainer_of("rpo", "out"), 5)
    assert {p.name for p in checkpoint.checkpoints(tmp_path / "out")} == {
        "checkpoint-4", "checkpoint-5",
    }  # fmt: skip
    harm(tmp_path / "out" / "checkpoint-5")
    resumed = trainer_of("rpo", "out")
    started_at: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            started_at.append(state.global_step)

    resumed.add_callback(Watch())
    resumed.train(resume_from_checkpoint=True)
    assert started_at == [4]
    assert "checkpoint-5 is damaged" in caplog.text
    assert_bitwise_equal(resumed.model, expected)


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(trainer_of, tmp_path):
    with raises("run.no-complete-checkpoint", RunError):
        trainer_of("rpo", "out").train(resume_from_checkpoint=True)
    kill(trainer_of("rpo", "out"), 2)
    for path in checkpoint.checkpoints(tmp_path / "out"):
        unfinished(path)
    with raises("run.no-complete-checkpoint", RunError):
        trainer_of("rpo", "out").train(resume_from_checkpoint=True)


def test_a_named_checkpoint_that_is_damaged_is_refused(trainer_of, tmp_path):
    kill(trainer_of("rpo", "out"), 2)
    folder = tmp_path / "out" / "checkpoint-2"
    cut(folder)
    with raises("run.damaged-checkpoint", RunError, where=str(folder)) as error:
        trainer_of("rpo", "out").train(resume_from_checkpoint=str(folder))
    assert "optimizer.pt" in error.value.what and "100" in error.value.what


def test_another_reference_is_refused(trainer_of, make_trainer, tmp_path):
    kill(trainer_of("rpo", "out"), 2)
    changed = make_trainer(
        "rpo", make_model(seed=1), rows_of("rpo"), output_dir=str(tmp_path / "out"),
        max_steps=STEPS, global_batch_size=4,
    )  # fmt: skip
    with raises("run.other-reference", RunError):
        changed.train(resume_from_checkpoint=True)


def test_resuming_computes_no_reference_again(trainer_of, monkeypatch):
    from rpo_trainer.step import reference

    kill(trainer_of("rpo", "out"), 2)
    monkeypatch.setattr(reference, "_VERIFIED_ROWS", 0)
    monkeypatch.setattr(reference, "_verify", lambda *args: None)
    monkeypatch.setattr(reference, "token_logprobs", None)
    trainer_of("rpo", "out").train(resume_from_checkpoint=True)


# --- files on disk ---


def test_leftovers_of_a_save_are_ignored_and_cleared(trainer_of, straight_models, tmp_path):
    expected = straight("rpo", trainer_of, straight_models)
    kill(trainer_of("rpo", "out"), 2)
    leftover = tmp_path / "out" / checkpoint.STAGING / "checkpoint-3"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    resumed = trainer_of("rpo", "out")
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(resumed.model, expected)
    assert not (tmp_path / "out" / checkpoint.STAGING).exists()


@pytest.mark.parametrize(
    "method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "commit"]
)
def test_a_crash_while_saving_leaves_no_checkpoint(method, trainer_of, tmp_path, monkeypatch):
    trainer = trainer_of("rpo", "out")

    def crash(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2:
            raise OSError("disk full")
        return own(*args, **kwargs)

    if method == "commit":
        own = checkpoint.write_manifest
        monkeypatch.setattr(checkpoint, "write_manifest", crash)
    else:
        own = getattr(trainer, method)
        monkeypatch.setattr(trainer, method, crash)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert checkpoint.verify_manifest(tmp_path / "out" / "checkpoint-1") is None


def test_checkpoints_are_limited_and_whole(trainer_of, tmp_path):
    trainer_of("rpo", "out", save_total_limit=3).train()
    found = checkpoint.checkpoints(tmp_path / "out")
    assert [p.name for p in found] == ["checkpoint-8", "checkpoint-7", "checkpoint-6"]
    for folder in found:
        assert checkpoint.verify_manifest(folder) is None
        files = set(json.loads((folder / checkpoint.MANIFEST).read_text())["files"])
        assert {
            "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
            "trainer_state.json", "reference.json", "config.json",
        } <= files  # fmt: skip


def test_a_checkpoint_is_a_model_that_loads(trainer_of, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = trainer_of("rpo", "out")
    trainer.train()
    assert_bitwise_equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-8"), trainer.model
    )


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_the_best_model_is_kept_and_loaded_at_the_end(limit, make_trainer, starts, tmp_path):
    from safetensors.torch import load_file

    # The eval rewards are reversed: every step makes the metric worse, so the first one is best.
    rows = rows_of("rpo")
    worse = [{**row, "rewards": row["rewards"][::-1]} for row in rows]
    trainer = make_trainer(
        "rpo", copy.deepcopy(starts["rpo"]), rows, eval_rows=worse,
        output_dir=str(tmp_path / "out"), max_steps=4, global_batch_size=10, learning_rate=1.0,
        save_strategy="steps", save_steps=1, save_total_limit=limit, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    best = tmp_path / "out" / "checkpoint-1"
    assert Path(trainer.state.best_model_checkpoint) == best and best.is_dir()
    # With a limit of one, transformers only keeps the best at the end.
    left = {None: {1, 2, 3, 4}, 3: {1, 3, 4}, 2: {1, 4}, 1: {1}}[limit]
    assert {int(p.name[11:]) for p in checkpoint.checkpoints(tmp_path / "out")} == left
    for folder in checkpoint.checkpoints(tmp_path / "out"):
        assert checkpoint.verify_manifest(folder) is None
        state = json.loads((folder / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]) == best
    stored = load_file(best / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize(
    ("file", "lacks"),
    [
        ("optimizer.pt", "optimizer"),
        ("scheduler.pt", "scheduler"),
        ("rng_state.pth", "rng"),
        ("trainer_state.json", "trainer"),
    ],
)
def test_a_checkpoint_that_lacks_a_state_is_refused(file, lacks, trainer_of, tmp_path):
    trainer_of("rpo", "whole", max_steps=2, save_steps=1).train()
    folder = tmp_path / "whole" / "checkpoint-1"
    (folder / checkpoint.MANIFEST).unlink()  # as other tools write them
    (folder / file).unlink()
    trainer = trainer_of("rpo", "whole", max_steps=2, save_steps=1)
    with raises("run.incomplete-checkpoint", RunError, where=str(folder), missing=[lacks]):
        trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 0


def test_a_run_cannot_resume_from_weights_alone(trainer_of, tmp_path):
    settings = {"max_steps": 2, "save_steps": 1, "save_only_model": True}
    trainer_of("rpo", "light", **settings).train()
    assert not (tmp_path / "light" / "checkpoint-1" / "optimizer.pt").exists()
    for wanted in (True, str(tmp_path / "light" / "checkpoint-1")):
        with raises("run.incomplete-checkpoint", RunError) as caught:
            trainer_of("rpo", "light", **settings).train(resume_from_checkpoint=wanted)
        assert {"optimizer", "rng"} <= set(caught.value.details["missing"])
        assert "save_only_model" in str(caught.value.why)


def test_float16_needs_its_scale(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).touch()
    settings: dict[str, Any] = {"own_scheduler": True, "ranks": 1}
    checkpoint.require_state(folder, scaler=False, **settings)
    with raises("run.incomplete-checkpoint", RunError, missing=["scaler"]):
        checkpoint.require_state(folder, scaler=True, **settings)


def test_another_number_of_processes_is_a_warning(tmp_path, caplog):
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / name).touch()
    checkpoint.require_state(tmp_path, scaler=False, own_scheduler=True, ranks=2)
    (said,) = caplog.records
    assert said.levelname == "WARNING" and said.name == "rpo_trainer.trainers.checkpoint"


def starts_at(trainer: Any, **settings: Any) -> int:
    """Train and return the step that training has resumed from."""
    steps = []

    class Note(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    trainer.add_callback(Note())
    trainer.train(**settings)
    return steps[0]


def test_the_config_may_name_the_checkpoint(trainer_of, tmp_path):
    trainer_of("rpo", "named", max_steps=2, save_steps=1).train()
    folder = str(tmp_path / "named" / "checkpoint-1")
    again = trainer_of("rpo", "named", max_steps=2, resume_from_checkpoint=folder)
    assert starts_at(again) == 1


@pytest.mark.parametrize("by_config", [True, False])
def test_what_a_command_line_says_is_resumed_from(by_config, trainer_of, tmp_path):
    def resume(wanted: str, folder: str) -> int:
        settings = {"resume_from_checkpoint": wanted} if by_config else {}
        trainer = trainer_of("rpo", folder, max_steps=2, save_steps=1, **settings)
        return starts_at(trainer, **({} if by_config else {"resume_from_checkpoint": wanted}))

    assert resume("False", "out") == 0
    assert resume("True", "out") == 2
    with raises("run.no-complete-checkpoint", RunError):
        resume("true", "nothing")
    with raises("run.no-such-checkpoint", RunError) as caught:
        resume(str(tmp_path / "out" / "checkpoint-9"), "out")
    assert caught.value.where.endswith("checkpoint-9")
