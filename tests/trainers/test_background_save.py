"""`async_save`: the same checkpoints, written while training continues."""

from __future__ import annotations

import copy
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rpo_trainer.errors import RecipeError, RunError, StoppedBySignal
from rpo_trainer.trainers import SFTConfig, checkpoint
from rpo_trainer.trainers.background_save import BackgroundSave, in_cpu_memory
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import make_rows

STEPS = 4


@pytest.fixture
def trainer_of(make_trainer, tmp_path):
    def make(out: str, kind: str = "rpo", **settings: Any) -> Any:
        if settings.pop("lora", False):
            from peft import LoraConfig

            torch.manual_seed(0)
            settings["peft_config"] = LoraConfig(target_modules=["q_proj"], r=2)
        rows = make_rows(0, (2,) * 10, rewards=True)
        eval_rows = None
        if settings.get("eval_strategy"):  # reversed: every step makes the metric worse
            eval_rows = [{**row, "rewards": row["rewards"][::-1]} for row in rows]
        return make_trainer(
            kind, make_model(), rows, eval_rows=eval_rows,
            **{
                "output_dir": str(tmp_path / out), "max_steps": STEPS, "global_batch_size": 4,
                "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps",
                "save_steps": 1, "async_save": True, **settings,
            },
        )  # fmt: skip

    return make


class Held:
    """Holds the thread that writes before the checkpoints of these steps are committed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        own = checkpoint.commit

        def commit(staged: Path, *args: Any) -> None:
            if staged.name in {f"checkpoint-{step}" for step in steps}:
                self.reached.set()
                assert self.released.wait(60)
            own(staged, *args)

        monkeypatch.setattr(checkpoint, "commit", commit)


class AtStep(TrainerCallback):
    """Call `do` when a step begins, with `step` steps done."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.do()


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != checkpoint.MANIFEST:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def steps_on_disk(folder: Path) -> set[int]:
    return {int(path.name[11:]) for path in checkpoint.checkpoints(folder)}


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_are_bytewise_those_of_a_run_that_waits(lora, trainer_of, tmp_path):
    trainer_of("same", lora=lora, async_save=False).train()
    written = {
        path.name: dict(contents(path)) for path in checkpoint.checkpoints(tmp_path / "same")
    }
    for path in checkpoint.checkpoints(tmp_path / "same"):
        path.rename(path.with_name(f"waited-{path.name}"))
    trainer_of("same", lora=lora).train()  # the same output_dir: no path differs
    found = checkpoint.checkpoints(tmp_path / "same")
    assert len(found) == STEPS
    for path in found:
        assert checkpoint.verify_manifest(path, content=True) is None
        now, before = dict(contents(path)), written[path.name]
        assert now.keys() == before.keys()
        for name, content in now.items():
            if name != "trainer_state.json":  # has times
                assert content == before[name], (path.name, name)
    assert not (tmp_path / "same" / checkpoint.STAGING).exists()


def test_training_continues_while_a_checkpoint_is_written(trainer_of, tmp_path, monkeypatch):
    held, seen = Held(monkeypatch, 2), []
    trainer = trainer_of("out", save_steps=2)

    def look() -> None:
        assert held.reached.wait(60)
        seen.append(steps_on_disk(tmp_path / "out"))  # step 3 of 4 begins, 2 is not written yet
        held.released.set()

    trainer.add_callback(AtStep(3, look))
    trainer.train()
    assert seen == [set()] and steps_on_disk(tmp_path / "out") == {2, 4}


def test_the_copy_is_that_of_its_step(trainer_of, tmp_path, monkeypatch):
    """Weights that change before they are written do not change the checkpoint."""
    from safetensors.torch import load_file

    held, weights = Held(monkeypatch, 2), {}
    trainer = trainer_of("out", save_steps=2)
    trainer.add_callback(
        AtStep(2, lambda: weights.update(copy.deepcopy(trainer.model.state_dict())))
    )
    trainer.add_callback(AtStep(3, held.released.set))
    trainer.train()
    stored = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, weights[name]), name
        assert name == "lm_head.weight" or not torch.equal(tensor, trainer.model.state_dict()[name])


@pytest.mark.parametrize("limit", [1, 2, None])
def test_the_best_model_is_kept_and_loaded(limit, trainer_of, tmp_path):
    from safetensors.torch import load_file

    trainer = trainer_of(
        "out", save_total_limit=limit, eval_strategy="steps", eval_steps=1, learning_rate=1.0,
        optim="sgd", global_batch_size=10,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / "out" / "checkpoint-1"
    assert steps_on_disk(tmp_path / "out") == {None: {1, 2, 3, 4}, 2: {1, 4}, 1: {1}}[limit]
    for path in checkpoint.checkpoints(tmp_path / "out"):
        assert checkpoint.verify_manifest(path, content=True) is None
        state = json.loads((path / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]) == best
    stored = load_file(best / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


# --- errors and ends ---


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


@pytest.mark.parametrize(("save_steps", "ends"), [(1, 2), (2, STEPS), (4, STEPS)])
def test_a_full_disk_ends_training_at_the_next_checkpoint_or_at_the_end(
    save_steps, ends, trainer_of, tmp_path, monkeypatch, caplog
):
    from transformers import modeling_utils

    trainer = trainer_of("out", save_steps=save_steps)
    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with raises("run.file-system", RunError) as error:
        trainer.train()
    assert error.value.what.endswith(os.strerror(errno.ENOSPC))
    assert trainer.state.global_step == ends
    assert "was not written" in caplog.text
    assert steps_on_disk(tmp_path / "out") == set()
    monkeypatch.undo()
    again = trainer_of("out", save_steps=save_steps)
    again.train()
    assert checkpoint.last_complete(tmp_path / "out") == tmp_path / "out" / f"checkpoint-{STEPS}"


def test_another_error_in_the_thread_is_raised_as_it_is(trainer_of, monkeypatch):
    bug = RuntimeError("the size of tensor a must match the size of tensor b")

    def fail(*args: Any) -> None:
        raise bug

    monkeypatch.setattr(checkpoint, "commit", fail)
    with pytest.raises(RuntimeError, match="tensor a") as error:
        trainer_of("out").train()
    assert error.value is bug


def raising(error: BaseException) -> Any:
    def do() -> None:
        raise error

    return do


def test_an_error_in_training_waits_for_the_checkpoint(trainer_of, tmp_path, monkeypatch):
    held = Held(monkeypatch, 1)
    trainer = trainer_of("out", callbacks=[AtStep(1, raising(ValueError("mine")))])
    threading.Timer(0.2, held.released.set).start()
    with pytest.raises(ValueError, match="mine"):
        trainer.train()
    assert steps_on_disk(tmp_path / "out") == {1}


@pytest.mark.parametrize(
    "error", [StoppedBySignal("again", code="run.stopped-by-signal"), KeyboardInterrupt()]
)
def test_a_stop_at_once_leaves_no_half_checkpoint(error, trainer_of, tmp_path, monkeypatch):
    """The second signal: the thread ends after the file it is writing, and nothing writes afterwards."""
    from transformers import modeling_utils

    own, writing, released = modeling_utils.safe_save_file, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> None:
        writing.set()
        assert released.wait(60)
        own(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", slow)

    def stop() -> None:
        assert writing.wait(60)
        threading.Timer(0.2, released.set).start()
        raise error

    with pytest.raises(type(error)):
        trainer_of("out", callbacks=[AtStep(1, stop)]).train()
    assert steps_on_disk(tmp_path / "out") == set()
    assert not [t for t in threading.enumerate() if t.name.startswith("saving")]


# --- settings ---


def test_what_it_cannot_do_is_refused(tmp_path, monkeypatch):
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "async_save": True}
    with raises("training.conflicting-settings", RecipeError, settings=["async_save"]):
        SFTConfig(**plain, push_to_hub=True)
    assert SFTConfig(**plain, push_to_hub=True, hub_strategy="end").async_save
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with raises("training.unsupported-setting", RecipeError, settings=["async_save"]):
        SFTConfig(**plain)


def test_a_callback_that_may_need_the_checkpoint_is_named(trainer_of, caplog):
    class Uploads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pass

    trainer_of("out", callbacks=[Uploads()]).train()
    assert "Uploads" in caplog.text
    caplog.clear()
    trainer_of("other").train()
    assert "on_save" not in caplog.text


def test_copies_keep_what_is_shared():
    pair, weight = (0.9, 0.99), torch.ones(3)
    content = {"a": weight, "b": [weight], "groups": [{"betas": pair}, {"betas": pair}]}
    held = in_cpu_memory(content)
    assert held["a"] is held["b"][0] and held["a"].data_ptr() != weight.data_ptr()
    weight.zero_()
    assert torch.equal(held["a"], torch.ones(3))


def test_errors_of_a_save_drop_its_copies():
    background = BackgroundSave()

    def save() -> None:
        with background.deferred():
            background.torch_save({"a": torch.ones(2)}, Path("nowhere"))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        save()
    committed: list[bool] = []
    background.start(Path("checkpoint-1"), lambda: committed.append(True))
    background.finish()
    assert committed == [True]  # nothing else was written
