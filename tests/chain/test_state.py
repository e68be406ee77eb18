"""chain.json, what may change between two starts, the run directory and its lock."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.changes import SAFE_ARGUMENTS, SAFE_FIELDS, differences
from rpo_trainer.chain.run_dir import check_writable, locked, open_run_dir
from rpo_trainer.chain.state import ChainState, forget_metrics
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.recipe.schema import STAGE_KINDS, ModelSpec, Recipe
from rpo_trainer.trainers.base_config import BaseConfig
from tests.raising import raises

# Every field of a stage is on one of two lists; a new field must be added to one of them.
MATHEMATICAL = {
    "name", "kind", "init", "data", "max_length", "truncation", "global_batch_size",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim", "seed", "peft",
    "training_args", "repeat", "reference", "beta", "sft_loss_weight", "sft_reduction",
    "average_logps", "disable_dropout", "loss_type", "label_smoothing", "reward_scale",
    "save_dtype", "objective", "attributes", "rating_range", "reward_weights", "margin_scale",
    "router_aux_loss_coef",
}  # fmt: skip


# Fields of the recipe itself: their effect on the stages is compared, or they compute nothing.
OUTSIDE = {"run_dir", "defaults", "eval", "stages"}


def test_every_stage_field_is_declared_safe_or_mathematical() -> None:
    fields = {name for kind in STAGE_KINDS.values() for name in kind.model_fields}
    assert fields == MATHEMATICAL | SAFE_FIELDS
    assert not MATHEMATICAL & SAFE_FIELDS
    assert set(Recipe.model_fields) == OUTSIDE | {"model", "seed"}


@pytest.mark.parametrize("field", sorted(MATHEMATICAL - {"name"}))
def test_mathematical_fields_may_not_change(field: str, tmp_path: Path) -> None:
    text = field in ("kind", "init", "reference")
    old, new = ("x", "y") if text else ({"a": 1}, {"a": 2})
    begun(tmp_path, **{field: old})
    with raises("run.recipe-changed", RunError) as error:
        again(tmp_path, [spec("a", **{field: new}), spec("b")])
    change = f'{field}: "x" → "y"' if text else f"{field}.a: 1 → 2"
    assert f"stages.a.{change}" in error.value.what


@pytest.mark.parametrize("field", sorted(ModelSpec.model_fields))
def test_no_field_of_the_model_may_change(field: str, tmp_path: Path) -> None:
    state = ChainState(tmp_path)
    state.adopt([spec("a")], {field: 1}, 0)
    state.stages[0].state = "running"
    state.save()
    with raises("run.recipe-changed", RunError) as error:
        ChainState(tmp_path).adopt([spec("a")], {field: 2}, 0)
    assert f"model.{field}: 1 → 2" in error.value.what


def test_training_arguments_of_logging_and_the_hub_may_change(tmp_path: Path) -> None:
    known = {field.name for field in dataclasses.fields(BaseConfig)}
    assert known >= SAFE_ARGUMENTS
    begun(tmp_path, training_args={"adam_epsilon": 1e-8, "run_name": "a"})
    new = {"adam_epsilon": 1e-8, "logging_first_step": True, "push_to_hub": True}
    again(tmp_path, [spec("a", training_args=new), spec("b")])
    with raises("run.recipe-changed", RunError) as error:
        again(tmp_path, [spec("a", training_args={**new, "adam_epsilon": 1e-3}), spec("b")])
    assert "training_args.adam_epsilon: 1e-08 → 0.001" in error.value.what


def spec(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "kind": "dpo", "init": "model", "reference": "model", **fields}


def begun(run_dir: Path, **fields: Any) -> None:
    """A run of two stages, of which the first has begun."""
    state = ChainState(run_dir)
    state.adopt([spec("a", **fields), spec("b")], {"name_or_path": "m"}, 0)
    state.stages[0].state = "running"
    state.stages[0].steps = 7
    state.save()


def again(run_dir: Path, stages: list[dict[str, Any]], model: str = "m", seed: int = 0) -> Any:
    state = ChainState(run_dir)
    state.adopt(stages, {"name_or_path": model}, seed)
    return state


def test_records_of_stages_that_have_begun_are_kept(tmp_path: Path) -> None:
    begun(tmp_path, beta=0.1)
    state = again(tmp_path, [spec("a", beta=0.1), spec("b", beta=0.7), spec("c")])
    assert [r.state for r in state.stages] == ["running", "pending", "pending"]
    assert state.stage("a").steps == 7
    assert state.stage("b").spec["beta"] == 0.7  # not begun: may change
    assert state.stage("x") is None


def test_a_stage_run_alone_may_be_preceded_by_pending_ones(tmp_path: Path) -> None:
    begun(tmp_path)
    state = again(tmp_path, [spec("new"), spec("a"), spec("b")])
    assert [r.state for r in state.stages] == ["pending", "running", "pending"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stages": [spec("a", beta=0.2)]}, "stages.a.beta: 0.1 → 0.2"),
        ({"stages": [spec("a")]}, "stages.a.beta: 0.1 → null"),
        (
            {"stages": [spec("a", beta=0.1, data={"train": 1})]},
            'stages.a.data: null → {"train": 1}',
        ),
        ({"stages": [spec("b")]}, "stages.a:"),
        ({"stages": [spec("a", beta=0.1)], "model": "n"}, 'model.name_or_path: "m" → "n"'),
        ({"stages": [spec("a", beta=0.1)], "seed": 5}, "seed: 0 → 5"),
    ],
)
def test_changes_where_it_has_computed_are_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    begun(tmp_path, beta=0.1)
    with raises("run.recipe-changed", RunError, where=str(tmp_path)) as error:
        again(tmp_path, **changes)
    assert f"\n    {line}" in f"{error.value.what}\n"
    assert "--run-dir" in str(error.value)


def test_all_changes_are_shown_at_once(tmp_path: Path) -> None:
    begun(tmp_path, beta=0.1, data={"train": [{"path": "x", "weight": 1}]})
    new = spec("a", beta=0.3, data={"train": [{"path": "y", "weight": 1}]})
    with raises("run.recipe-changed", RunError) as error:
        again(tmp_path, [new], seed=1)
    for text in ("seed: 0 → 1", "beta: 0.1 → 0.3", '"path": "y"'):
        assert text in str(error.value)


@pytest.mark.parametrize("field", sorted(SAFE_FIELDS))
def test_safe_fields_may_change(field: str, tmp_path: Path) -> None:
    begun(tmp_path, **{field: 1})
    state = again(tmp_path, [spec("a", **{field: 2}), spec("b")])
    assert state.stage("a").spec[field] == 2
    assert state.stage("a").state == "running"


# --- allowed changes ---


def allowed(run_dir: Path, stages: list[dict[str, Any]], *keys: str, seed: int = 0) -> ChainState:
    state = ChainState(run_dir)
    state.adopt(stages, {"name_or_path": "m"}, seed, allowed=keys)
    return state


def test_a_change_that_is_allowed_is_taken_over_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path, beta=0.1, data={"train": [1]})
    new = [spec("a", beta=0.2, data={"train": [1]}), spec("b")]
    with raises("run.recipe-changed", RunError) as error:
        allowed(tmp_path, new)
    assert "--allow-changed stages.a.beta" in str(error.value.fix)
    state = allowed(tmp_path, new, "stages.a.beta")
    assert state.stage("a").spec["beta"] == 0.2 and state.stage("a").steps == 7
    assert "stages.a.beta: 0.1 → 0.2" in caplog.text
    state.save()
    state = allowed(tmp_path, new)  # the next start has nothing to allow
    (change,) = state.changes
    assert (change.key, change.old, change.new) == ("stages.a.beta", 0.1, 0.2)
    assert change.when.endswith("Z")
    assert json.loads(state.path.read_text())["changes"] == [
        {"when": change.when, "key": "stages.a.beta", "from": 0.1, "to": 0.2}
    ]
    again = allowed(
        tmp_path, [spec("a", beta=0.1, data={"train": [1]}), spec("b")], "stages.a", seed=0
    )
    again.save()
    assert [c.new for c in ChainState(tmp_path).changes] == [0.2, 0.1]


def test_only_what_is_named_is_allowed(tmp_path: Path) -> None:
    begun(tmp_path, beta=0.1, data={"train": [1]})
    new = [spec("a", beta=0.2, data={"train": [2]}), spec("b")]
    with raises("run.recipe-changed", RunError) as error:
        allowed(tmp_path, new, "stages.a.beta", seed=1)
    text = str(error.value)
    assert "stages.a.beta" not in text
    assert "--allow-changed seed --allow-changed stages.a.data.train" in text
    allowed(tmp_path, new, "stages.a.beta", "stages.a.data", "seed", seed=1)


@pytest.mark.parametrize("field", ["kind", "optim", "peft"])
def test_what_no_checkpoint_can_take_up_is_never_allowed(field: str, tmp_path: Path) -> None:
    begun(tmp_path, **{field: "x"})
    with raises("run.recipe-changed", RunError) as error:
        allowed(tmp_path, [spec("a", **{field: "y"}), spec("b")], f"stages.a.{field}")
    assert f'stages.a.{field}: "x" → "y"' in error.value.what
    assert "--allow-changed" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["stages.a.bta", "stages.x", "stages.x.beta", "beta", "model.name", ""]
)
def test_an_allowed_key_that_is_none(key: str, tmp_path: Path) -> None:
    begun(tmp_path, beta=0.1)
    with raises("option.unknown-key", RecipeError, where=f"--allow-changed {key}") as error:
        allowed(tmp_path, [spec("a", beta=0.2), spec("b")], key)
    assert f"`{key}`" in error.value.what and error.value.fix


@pytest.mark.parametrize(
    ("key", "other"),
    [("stages.a.data", True), ("stages.a", True), ("stages.a.max_length", True), ("seed", True),
     ("model.chat_template", True), ("model", True), ("stages.a.data.train", True),
     ("stages.b.data", False), ("stages.a.learning_rate", False), ("model.dtype", False)],
)  # fmt: skip
def test_who_allows_other_examples(key: str, other: bool, tmp_path: Path) -> None:
    stages = [spec("a", data={"train": []}, max_length=3, learning_rate=1.0), spec("b", data={})]
    state = ChainState(tmp_path)
    state.adopt(stages, {"chat_template": None, "dtype": "float32"}, 0, allowed=[key])
    assert state.allows_other_data("a") == other


def test_before_anything_has_begun_everything_may_change(tmp_path: Path) -> None:
    state = ChainState(tmp_path)
    state.adopt([spec("a", beta=0.1)], {"name_or_path": "m"}, 0)
    state.save()
    again(tmp_path, [spec("z", beta=3.0)], model="n", seed=9)


def test_differences_go_down_to_the_leaves() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"a": {"b": 1, "c": [2]}, "e": "x"}
    assert [str(c) for c in differences("k", old, new)] == ["k.a.c: [1] → [2]", 'k.e: null → "x"']
    assert differences("k", old, old) == []


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"version": 1}', b"\xff\xfe",
        '{"version": 2, "model": {}, "seed": 0, "stages": []}',
        '{"version": 1, "model": {}, "seed": 0, "stages": [1]}',
        '{"version": 1, "model": {}, "seed": 0, "stages": [{"name": "a"}]}',
        '{"version": 1, "model": 3, "seed": 0, "stages": []}',
        '{"version": 1, "model": {}, "seed": null, "stages": []}',
        '{"version": 1, "model": {}, "seed": 0, "stages": [{"name": "a", "state": "dune", "spec": {}}]}',
        '{"version": 1, "model": {}, "seed": 0, "changes": [{"key": "seed"}], "stages": []}',
    ],
)  # fmt: skip
def test_a_corrupt_chain_json_is_an_error_for_people(text: str | bytes, tmp_path: Path) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "chain.json").write_bytes(raw)
    with raises("run.unreadable-state", RunError, where=str(tmp_path / "chain.json")):
        ChainState(tmp_path)
    assert (tmp_path / "chain.json").read_bytes() == raw


def test_a_flipped_bit_in_chain_json_is_found(tmp_path: Path) -> None:
    begun(tmp_path, beta=0.1)
    raw = (tmp_path / "chain.json").read_text()
    (tmp_path / "chain.json").write_text(raw.replace('"steps": 7', '"steps": 5'))
    with raises("run.unreadable-state", RunError):
        ChainState(tmp_path)
    (tmp_path / "chain.json").write_text(raw)
    ChainState(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path)
    before = (tmp_path / "chain.json").read_bytes()
    state = ChainState(tmp_path)
    state.stages[0].steps = object()
    with pytest.raises(TypeError):
        state.save()
    assert (tmp_path / "chain.json").read_bytes() == before
    assert json.loads(before)["stages"][0]["steps"] == 7


# --- the directory ---


def test_new_empty_and_own_directories_are_opened(tmp_path: Path) -> None:
    open_run_dir(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir()
    open_run_dir(tmp_path / "new" / "deep")
    (tmp_path / "new" / "deep" / ".lock").write_text("")  # all files that a failed start leaves
    open_run_dir(tmp_path / "new" / "deep")
    begun(tmp_path / "new" / "deep")
    (tmp_path / "new" / "deep" / "a").mkdir()
    open_run_dir(tmp_path / "new" / "deep")


def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with raises("run.not-a-run-directory", RunError, where=str(tmp_path)) as error:
        open_run_dir(tmp_path)
    assert "thesis.tex" in error.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with raises("run.not-a-directory", RunError, where=str(tmp_path / "run")):
        open_run_dir(tmp_path / "run")
    with raises("run.unusable-directory", RunError) as error:
        open_run_dir(tmp_path / "run" / "below")
    assert "Not a directory" in error.value.what
    assert (tmp_path / "run").read_text() == "x"


def test_check_finds_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with raises("run.unusable-directory", RunError, where=str(tmp_path / "file" / "run")):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with raises("run.unusable-directory", RunError, where=str(tmp_path / "new")):
        check_writable(tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with raises("run.unusable-directory", RunError) as error:
            open_run_dir(tmp_path)
        assert "Permission denied" in error.value.what
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_that_refuses_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with raises("run.unusable-directory", RunError) as error:
        open_run_dir(tmp_path)
    assert "No space left on device" in error.value.what


def test_a_directory_in_use_names_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        with raises("run.locked", RunError, where=str(tmp_path)) as error, locked(tmp_path):
            pass
        assert f"process {os.getpid()} on " in error.value.what
        # The refused start has not removed the lock.
        with raises("run.locked", RunError), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_an_error_is_reported_where_the_directory_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def fail() -> None:
        with locked(folder):
            shutil.rmtree(folder)
            raise ZeroDivisionError

    for _ in range(2):  # the lock is released too
        folder.mkdir()
        with pytest.raises(ZeroDivisionError):
            fail()


def _hold_and_die(folder: Path) -> None:
    with locked(folder):
        os._exit(9)


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=_hold_and_die, args=(tmp_path,)
    )
    process.start()
    process.join(600)
    assert process.exitcode == 9
    assert (tmp_path / ".lock-holder").read_text().startswith(f"process {process.pid} on ")
    with locked(tmp_path):
        assert (tmp_path / ".lock-holder").read_text().startswith(f"process {os.getpid()} on ")


# --- metrics ---


def test_metrics_after_the_step_resumed_from_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    forget_metrics(path, "a", 2)  # nothing there yet
    assert not path.exists()

    def write() -> None:
        lines = [
            {"stage": "a", "step": 0, "eval_loss": 9.0}, {"stage": "a", "step": 1, "loss": 1.0},
            {"stage": "a", "step": 2, "loss": 2.0}, {"stage": "a", "step": 2, "eval_loss": 8.0},
            {"stage": "b", "step": 5, "loss": 3.0}, {"stage": "a", "step": 3, "loss": 4.0},
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.write_text(text + '{"stage": "a", "ste')

    def left(**settings: Any) -> list[Any]:
        write()
        forget_metrics(path, "a", **settings)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(r["stage"], r["step"], "eval_loss" in r) for r in rows]

    early = [("a", 0, True), ("a", 1, False), ("a", 2, False)]
    assert left(after_step=2) == [*early, ("a", 2, True), ("b", 5, False)]
    assert left(after_step=2, evaluated=False) == [*early, ("b", 5, False)]
    assert left(after_step=-1) == [("b", 5, False)]
