"""Damaged run directories and changed recipes: refused with a fix, or resumed with the same weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from rpo_trainer.chain import models as chain_models
from rpo_trainer.chain import run_chain
from rpo_trainer.chain.run_dir import locked
from rpo_trainer.chain.state import CHAIN_FILE
from rpo_trainer.cli.commands import main
from rpo_trainer.errors import NonFiniteError, RPOTrainerError, RunError
from rpo_trainer.plan import disk
from rpo_trainer.trainers import checkpoint
from rpo_trainer.trainers.preference import PreferenceTrainer
from tests.chain import tiny
from tests.chain.killer import run_until
from tests.chain.test_refusals import pairs_file, rpo_from_file
from tests.conftest import Injected
from tests.raising import raises

Change = Callable[[tiny.Recipe], tiny.Recipe]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
DIGEST = xxhash.xxh3_128_hexdigest(TEMPLATE.encode())[:12]


def refused(
    code: str, folder: Path, recipe: tiny.Recipe | None = None, **settings: Any
) -> RPOTrainerError:
    """The error of a run in `folder`/run; nothing in it has changed, and no model was loaded."""
    before = tiny.content(folder / "run") if (folder / "run").is_dir() else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_models, "load_model", None)
        patch.setattr(chain_models, "load_weights", None)
        with raises(code, RunError) as error:
            tiny.run(folder, recipe, **settings)
    assert error.value.exit_code == 2
    assert error.value.where and error.value.what and error.value.fix
    assert (tiny.content(folder / "run") if (folder / "run").is_dir() else {}) == before
    return error.value


def assert_warned(caplog: pytest.LogCaptureFixture, shown: str) -> None:
    """One warning about the reference cache names its path, and its record is reset."""
    found = [r for r in caplog.records if r.name.startswith("rpo_trainer.step.reference")]
    assert [r.levelname for r in found if shown in r.getMessage()] == ["WARNING"]
    caplog.clear()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of one RPO stage on a file, stopped after step 2 of 3, two checkpoints kept."""
    folder = tmp_path_factory.mktemp("stopped")
    run_until("step:rpo:2", lambda: tiny.run(folder, recipe_of(folder)))
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return tiny.run(folder, recipe_of(folder))


def recipe_of(folder: Path) -> tiny.Recipe:
    recipe = rpo_from_file(folder)
    tiny.stage_of(recipe, "rpo").update(save_total_limit=2, optim="sgd")
    recipe["model"]["chat_template"] = "plain"
    return recipe


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, to be resumed."""
    return shutil.copytree(stopped, tmp_path / "again")


# --- the directory ---


def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    error = refused("run.not-a-run-directory", tmp_path, recipe)
    assert "thesis.tex" in error.what
    assert "--run-dir" in str(error.fix)


def test_a_directory_in_use_names_who_holds_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        error = refused("run.locked", tmp_path, recipe)
    assert re.search(rf"process {os.getpid()} on \S+$", error.what)
    assert error.where == str(tmp_path / "run") and "--run-dir" in str(error.fix)


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    (tmp_path / "run").mkdir()
    if os.geteuid() == 0:  # for a user who may write everywhere: the file system must report it
        own = Path.write_text

        def refuse(self: Path, *args: Any, **kwargs: Any) -> int:
            if self.parent == tmp_path / "run":
                raise PermissionError(13, "Permission denied", str(self))
            return own(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", refuse)
    else:
        (tmp_path / "run").chmod(stat.S_IRUSR | stat.S_IXUSR)
    error = refused("run.unusable-directory", tmp_path, recipe)
    assert "Permission denied" in error.what and "--run-dir" in str(error.fix)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("command", ["check", "run"])
def test_too_little_disk_for_the_plan(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(tmp_path)
    tiny.stage_of(recipe, "rpo")["optim"] = "adamw_torch"
    config = recipe["model"]["from_config"] | {"hidden_size": 512, "intermediate_size": 1024}
    recipe["model"]["from_config"] = config
    path = tiny.write_recipe(tmp_path, recipe)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**20))
    monkeypatch.setattr(chain_models, "load_model", None)
    with pytest.raises(SystemExit) as end:
        main([command, str(path), "--run-dir", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert end.value.code == 2
    # 3.4 M weights of 4 bytes; a checkpoint is three times that; two are kept and one is being written.
    assert re.search(r" 1\d\d MiB of .* 1 MiB .*\[run\.disk-full\]", shown), shown
    assert "rpo (output 1" in shown and "checkpoints " in shown
    assert "save_total_limit" in shown and "--run-dir" in shown
    assert tiny.written(tmp_path / "run") <= {".lock"}


def test_too_little_disk_for_what_is_left(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**10))
    error = refused("run.disk-full", again, recipe_of(again))
    assert " 0 MiB " in error.what
    there = sum(p.stat().st_size for p in (again / "run" / "rpo").rglob("*") if p.is_file())
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(2**40, 0, there))
    tiny.run(again, recipe_of(again))  # files that exist already are subtracted


# --- resuming with something else ---

CHANGES: dict[str, tuple[Change, str, str]] = {
    "loss": (
        lambda r: tiny.changed(r, "rpo.loss_type", "rpo_sq"),
        'stages.rpo.loss_type: "rpo_bwd_kl" → "rpo_sq"', "stages.rpo.loss_type",
    ),
    "learning rate": (
        lambda r: tiny.changed(r, "rpo.learning_rate", 1e-2),
        "stages.rpo.learning_rate: 0.001 → 0.01", "stages.rpo.learning_rate",
    ),
    "template": (
        lambda r: tiny.changed(r, "model", {**r["model"], "chat_template": "./mine.jinja"}),
        f'model.chat_template: "plain" → "./mine.jinja ({DIGEST})"',
        "model.chat_template",
    ),
    "seed": (
        lambda r: tiny.changed(r, "rpo.seed", 4), "stages.rpo.seed: null → 4", "stages.rpo.seed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_resume_with_another(case: str, again: Path, straight: Path) -> None:
    change, shown, key = CHANGES[case]
    (again / "mine.jinja").write_text(TEMPLATE)
    error = refused("run.recipe-changed", again, change(recipe_of(again)))
    assert error.what.endswith(f":\n    {shown}")
    assert str(error.fix).endswith(f"--allow-changed {key}")
    run_dir = tiny.run(again, change(recipe_of(again)), allow_changed=[key])
    (noted,) = json.loads((run_dir / CHAIN_FILE).read_text())["changes"]
    assert noted["key"] == key and noted["when"]
    # It is used from here on; a template does not affect plain-text rows.
    assert (tiny.weights(run_dir) != tiny.weights(straight)) == (case != "template")
    assert tiny.run(again, change(recipe_of(again))) == run_dir  # the next start sees no difference


def test_resume_with_another_text_in_the_template(again: Path) -> None:
    """The recipe names the same file as before."""
    (again / "mine.jinja").write_text(TEMPLATE)
    recipe = CHANGES["template"][0](recipe_of(again))
    tiny.run(again, recipe, allow_changed=["model.chat_template"])
    (again / "mine.jinja").write_text(TEMPLATE + " ")
    error = refused("run.recipe-changed", again, recipe)
    assert re.search(r"model.chat_template: \"./mine.jinja \(\w+\)\" → \"./mine.jinja", error.what)
    tiny.run(again, recipe, allow_changed=["model.chat_template"])


def test_resume_with_other_data(again: Path, straight: Path) -> None:
    pairs_file(again / "pairs.jsonl")
    recipe = recipe_of(again)
    pairs_file(again / "pairs.jsonl", shift=1.0)

    def go_on(**settings: Any) -> Path:
        return run_chain(tiny.load(again, recipe), again / "run", **settings)

    before = tiny.content(again / "run")
    with raises("run.input-changed", RunError) as error:
        go_on()
    assert "stages.rpo.data.train.0: pairs.jsonl" in error.value.what
    assert str(error.value.fix).endswith("--allow-changed stages.rpo.data")
    assert tiny.content(again / "run") == before
    go_on(allow_changed=["stages.rpo.data"])
    changes = json.loads((again / "run" / CHAIN_FILE).read_text())["changes"]
    assert [change["key"] for change in changes] == [
        "stages.rpo.data.train.0: pairs.jsonl", "stages.rpo.data: examples",
    ]  # fmt: skip
    assert tiny.weights(again / "run") != tiny.weights(straight)
    before = tiny.content(again / "run")
    go_on()
    assert tiny.content(again / "run") == before


def test_the_command_takes_the_keys(
    again: Path, capsys: pytest.CaptureFixture[str], straight: Path
) -> None:
    path = tiny.write_recipe(again, recipe_of(again))
    words = ["run", str(path), "--run-dir", str(again / "run"), "--no-report"]
    words += ["stages.rpo.beta=0.7", "stages.rpo.reward_scale=2.0"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--allow-changed", "stages.rpo.beta"])
    assert end.value.code == 2
    assert "reward_scale: 1.0 → 2.0" in (shown := capsys.readouterr().err) and "beta:" not in shown
    with pytest.raises(SystemExit) as end:
        main([*words, "--allow-changed", "stages.rpo.bta"])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "--allow-changed stages.rpo.bta: " in shown and "[option.unknown-key]" in shown
    keys = ["--allow-changed", "stages.rpo.beta", "--allow-changed", "stages.rpo.reward_scale"]
    with pytest.raises(SystemExit) as end:
        main([*words, *keys])
    assert end.value.code == 0
    assert tiny.weights(again / "run") != tiny.weights(straight)


def test_a_learning_rate_that_is_allowed_is_the_one_that_is_used(again: Path) -> None:
    """A checkpoint holds the old value, in its optimizer and in its schedule."""
    recipe = tiny.changed(recipe_of(again), "rpo.learning_rate", 1e-2)
    tiny.run(again, recipe, allow_changed=["stages.rpo.learning_rate"])
    rates = {m["step"]: m["learning_rate"] for m in tiny.metrics(again / "run") if "loss" in m}
    assert rates == {1: 1e-3, 2: 1e-3, 3: 1e-2}


# --- outputs ---


def test_a_stage_output_deleted_or_edited(finished_copy: Path, tmp_path: Path) -> None:
    final = finished_copy / "general" / "final"
    raw = (final / "model.safetensors").read_bytes()
    (final / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    error = refused("run.damaged-output", tmp_path)
    assert "model.safetensors" in error.what
    assert error.where == str(final) and "--run-dir" in str(error.fix)
    shutil.rmtree(final)
    assert "manifest.json" in refused("run.damaged-output", tmp_path).what


# --- what is accepted ---


def test_changed_save_logging_and_report_settings(again: Path, straight: Path) -> None:
    recipe = recipe_of(again)
    tiny.stage_of(recipe, "rpo").update(
        save_steps=2, save_total_limit=1, logging_steps=3, report_to="none",
        training_args={"run_name": "mine", "logging_first_step": True},
    )  # fmt: skip
    assert tiny.weights(tiny.run(again, recipe)) == tiny.weights(straight)


def test_a_moved_run_directory(again: Path, straight: Path, tmp_path: Path) -> None:
    moved = shutil.move(again, tmp_path / "else where")
    assert tiny.weights(tiny.run(Path(moved), recipe_of(Path(moved)))) == tiny.weights(straight)


def test_a_finished_run_is_done(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight.parent, tmp_path, dirs_exist_ok=True)
    path, before = tmp_path / "recipe.yaml", tiny.content(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["run", str(path), "--run-dir", str(tmp_path / "run"), "--no-report"])
    assert end.value.code == 0
    assert str(tmp_path / "run") in capsys.readouterr().err
    assert tiny.content(tmp_path / "run") == before


# --- repaired, with a warning ---


def cut(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 9)


def half_written(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


@pytest.mark.parametrize("harm", [cut, half_written])
def test_a_damaged_or_half_written_last_checkpoint(
    harm: Callable[[Path], None], again: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(again / "run" / "rpo" / "checkpoint-2")
    began: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        own = checkpoint.last_complete
        patch.setattr(
            "rpo_trainer.chain.training.last_complete",
            lambda folder, **given: began.append(int(str(own(folder))[-1])) or own(folder, **given),
        )
        run_dir = tiny.run(again, recipe_of(again))
    assert began == [1]  # the previous one is used
    assert "checkpoint-2 is damaged" in caplog.text
    assert tiny.weights(run_dir) == tiny.weights(straight)


def test_a_stale_lock(again: Path, straight: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A killed process has left its name in the file; the lock itself was released."""
    (again / "run" / ".lock").write_text("")
    (again / "run" / ".lock-holder").write_text("process 1 on elsewhere")
    assert tiny.weights(tiny.run(again, recipe_of(again))) == tiny.weights(straight)
    assert not (again / "run" / ".lock-holder").exists()
    assert caplog.text.count("(process 1 on elsewhere) died") == 1


def test_a_stale_or_half_written_reference_cache(
    again: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.numpy import load_file

    from rpo_trainer.step.reference_cache import ReferenceCache

    (part,) = (again / "run" / "reference-cache").rglob("part-*")
    keys = load_file(part)["keys"].tolist()
    part.unlink()
    ReferenceCache(part.parent).add(dict.fromkeys(map(tuple, keys), -1.0))  # readable, but wrong
    copied = shutil.copytree(again, again.with_name("half"))
    assert tiny.weights(tiny.run(again, recipe_of(again))) == tiny.weights(straight)
    assert_warned(caplog, str(part.parent))
    (part,) = (copied / "run" / "reference-cache").rglob("part-*")
    os.truncate(part, 100)
    assert tiny.weights(tiny.run(copied, recipe_of(copied))) == tiny.weights(straight)
    assert_warned(caplog, part.name)


# --- outside the run directory ---


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails(
    event: str, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from transformers.integrations import integration_utils

    class Tracker(integration_utils.TrainerCallback):
        pass

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the service is gone")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    setattr(Tracker, event, fail)
    recipe = tiny.changed(recipe_of(tmp_path), "rpo.report_to", "mlflow")
    run_dir = tiny.run(tmp_path, recipe)
    assert tiny.weights(run_dir) == tiny.weights(straight)
    assert (
        caplog.text.count("the tracker Tracker failed (ConnectionError: the service is gone)") == 1
    )
    assert tiny.metric_steps(run_dir, "rpo") == tiny.metric_steps(straight, "rpo")


def test_a_hub_push_that_fails_at_the_end(
    tmp_path: Path,
    straight: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the hub is gone")

    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, fail)
    recipe = tiny.changed(recipe_of(tmp_path), "rpo.training_args", {"push_to_hub": True})
    run_dir = tiny.run(tmp_path, recipe)
    assert tiny.weights(run_dir) == tiny.weights(straight)
    assert tiny.records(run_dir)["rpo"]["state"] == "done"
    assert "the hub is gone" in caplog.text


# --- during the run ---


def test_a_second_signal_ends_at_once(injected: Injected) -> None:
    from rpo_trainer.chain.stop_signal import StopOnSignal
    from rpo_trainer.errors import StoppedBySignal

    stop = StopOnSignal()
    stop.busy = True  # in training: the first is only noted
    with stop.installed():
        signal.raise_signal(signal.SIGINT)
        with raises("run.stopped-by-signal", StoppedBySignal) as error:
            signal.raise_signal(signal.SIGINT)
    assert "SIGINT" in error.value.what
    injected("a second SIGINT", "stopped")


def test_a_failed_step_zero_check_is_kept(tmp_path: Path) -> None:
    from rpo_trainer.errors import StepZeroError

    recipe = recipe_of(tmp_path)
    recipe["model"]["from_config"]["attention_dropout"] = 0.5
    tiny.stage_of(recipe, "rpo")["disable_dropout"] = False
    with raises("training.step-zero", StepZeroError) as error:
        tiny.run(tmp_path, recipe)
    kept = tiny.records(tmp_path / "run")["rpo"]["step0"]
    assert kept["ok"] is False and kept["nats_per_token"] > 1e-3
    assert kept["why"] == error.value.why


def test_dropout_in_the_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path)
    recipe["model"]["from_config"]["attention_dropout"] = 0.5
    run_dir = tiny.run(tmp_path, recipe)
    assert tiny.records(run_dir)["rpo"]["step0"]["ok"]
    warned = [r for r in caplog.records if "attention_dropout" in r.getMessage()]
    assert {record.levelname for record in warned} == {"WARNING"}
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "other")])
    assert end.value.code == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "attention_dropout 0.5" in x]
    assert len(lines) == 1 and "WARNING: " in lines[0]


def test_a_stage_that_skips_says_so_in_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = PreferenceTrainer.losses

    def spoiled(self: Any, sums: Any, batch: Any) -> Any:
        bad = self.model.training and self.state.global_step == 1
        return own(self, sums * float("nan") if bad else sums, batch)

    monkeypatch.setattr(PreferenceTrainer, "losses", spoiled)
    recipe = tiny.changed(recipe_of(tmp_path), "rpo.on_nonfinite", "skip")
    recipe = tiny.changed(recipe, "rpo.max_skipped_steps", 1)
    straight = tiny.run(tmp_path / "straight", {**recipe, "stages": with_file(tmp_path, recipe)})
    run_until("step:rpo:2", lambda: tiny.run(tmp_path, recipe))
    stopped = tiny.records(tmp_path / "run")["rpo"]["skipped"]
    run_dir = tiny.run(tmp_path, recipe)
    assert tiny.weights(run_dir) == tiny.weights(straight)
    (skipped,) = tiny.records(run_dir)["rpo"]["skipped"]
    assert [skipped] == stopped == tiny.records(straight)["rpo"]["skipped"]
    assert skipped["step"] == 2 and skipped["what"] == "loss" and len(skipped["rows"]) == 4
    lines = {m["step"]: m for m in tiny.metrics(run_dir)}
    assert [lines[step].get("nonfinite/skipped") for step in (1, 2, 3)] == [None, 1, 1]
    assert ["loss" in lines[step] for step in (1, 2, 3)] == [True, False, True]
    (warned,) = [r for r in caplog.records if r.name == "rpo_trainer.trainers.guards"][:1]
    assert warned.levelname == "WARNING" and "step 2" in warned.getMessage()
    assert "1 of at most 1" in warned.getMessage()
    (tmp_path / "stop").mkdir()
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "stop")
    stop = tiny.changed(recipe, "rpo.on_nonfinite", "stop")
    stop = tiny.changed(stop, "rpo.max_skipped_steps", None)
    with raises("training.not-finite", NonFiniteError) as error:
        tiny.run(tmp_path / "stop", stop)
    assert "loss" in error.value.what and "step 2" in error.value.what
    # A stopped run may be resumed with `skip`: the computed steps are the same.
    assert tiny.weights(tiny.run(tmp_path / "stop", recipe)) == tiny.weights(straight)


def with_file(folder: Path, recipe: tiny.Recipe) -> Any:
    """The stages of a recipe, and its data file at a path where a run in another directory finds it."""
    (folder / "straight").mkdir()
    shutil.copy(folder / "pairs.jsonl", folder / "straight")
    return recipe["stages"]
