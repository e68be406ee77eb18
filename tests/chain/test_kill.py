"""Killed at any point and resumed, a run has bitwise the weights of the uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.errors import StoppedBySignal
from rpo_trainer.trainers import checkpoint
from tests.chain import tiny
from tests.chain.killer import MARKER, at, in_process, killed_after, run_until
from tests.conftest import Injected


def last_step(run_dir: Path, stage: str) -> int:
    """Step of the last complete checkpoint; 0 without one."""
    found = checkpoint.last_complete(run_dir / stage)
    return 0 if found is None else int(found.name.split("-")[1])


def assert_like_straight(
    run_dir: Path, finished: Path, stages: Sequence[str] = tiny.STAGES
) -> None:
    """Compare weights and state; every step is logged once."""
    found, expected = tiny.weights(run_dir), tiny.weights(finished)
    after, straight = tiny.records(run_dir), tiny.records(finished)
    for name in stages:
        assert found[name] == expected[name]
        assert after[name]["state"] == "done"
        assert tiny.metric_steps(run_dir, name) == tiny.metric_steps(finished, name)
        for key in ("examples", "steps", "data", "output", "step0"):
            assert after[name].get(key) == straight[name].get(key), (name, key)
        for key in ("eval_before", "eval_after"):
            losses = [r[name].get(key, {}).get("eval_loss") for r in (after, straight)]
            assert losses[0] == losses[1]
    for stage in set(stages) - {"code", "general"}:
        gaps = [(run / stage / "gaps.jsonl").read_text() for run in (run_dir, finished)]
        assert gaps[0] == gaps[1]
    assert not list(run_dir.glob("*/.final")) and not list(run_dir.glob("*/.staging"))


# --- in this process, by an exception, from the affected stage on ---

# The point, its stage, the last complete checkpoint at that point, and whether there is an output.
POINTS = [
    ("replace:run/chain.json", "code", 0, False),
    ("replace:run/recipe.yaml", "code", 0, False),
    ("begin:code", "code", 0, False),
    ("step:code:0", "code", 0, False),
    ("step:code:4", "code", 4, False),
    ("evaluated:code", "code", 6, False),
    ("step:general:3", "general", 3, False),
    ("file:general/.staging/checkpoint-3/optimizer.pt", "general", 2, False),
    ("file:general/.staging/checkpoint-3/scheduler.pt", "general", 2, False),
    ("file:general/.staging/checkpoint-3/rng_state.pth", "general", 2, False),
    ("file:general/.staging/checkpoint-3/trainer_state.json", "general", 2, False),
    ("file:general/.staging/checkpoint-3/config.json", "general", 2, False),
    ("replace:general/.staging/checkpoint-3/manifest.json", "general", 2, False),
    ("replace:general/checkpoint-3", "general", 2, False),
    ("replaced:general/checkpoint-3", "general", 3, False),
    ("file:general/.final/model.safetensors", "general", 6, False),
    ("file:general/.final/tokenizer_config.json", "general", 6, False),
    ("replace:general/.final/manifest.json", "general", 6, False),
    ("replace:general/final", "general", 6, False),
    ("replaced:general/final", "general", 6, True),
    ("saved:general:done", "general", 6, True),
    ("begin:dpo", "dpo", 0, False),
    ("generated:2", "dpo", 0, False),
    ("replace:dpo/generated-", "dpo", 0, False),
    ("replaced:dpo/generated-", "dpo", 0, False),
    ("saved:dpo:running", "dpo", 0, False),
    ("replace:reference-cache", "dpo", 0, False),
    ("replaced:reference-cache", "dpo", 0, False),
    ("step:dpo:1", "dpo", 1, False),
    ("file:dpo/.staging/checkpoint-2/reference.json", "dpo", 1, False),
    ("step:rpo-1:2", "rpo-1", 2, False),
    ("file:rpo-2/.staging/checkpoint-2/model.safetensors", "rpo-2", 1, False),
    ("step:rpo-2:1", "rpo-2", 1, False),
]
# One or two points of each kind; the others are slow tests.
FAST = {
    "step:code:4", "evaluated:code", "file:general/.staging/checkpoint-3/optimizer.pt",
    "replace:general/checkpoint-3", "file:general/.final/model.safetensors",
    "replaced:general/final", "generated:2", "replaced:dpo/generated-", "step:dpo:1",
    "step:rpo-1:2",
}  # fmt: skip
_IN_PROCESS = [
    pytest.param(*p, id=p[0], marks=() if p[0] in FAST else pytest.mark.slow) for p in POINTS
]


def assert_stopped_there(run_dir: Path, stage: str, step: int, output: bool) -> None:
    assert last_step(run_dir, stage) == step
    assert (checkpoint.verify_manifest(run_dir / stage / "final") is None) == output
    later = tiny.STAGES[tiny.STAGES.index(stage) + 1 :]
    assert not any((run_dir / name).exists() for name in later)


@pytest.mark.parametrize(("point", "stage", "step", "output"), _IN_PROCESS)
def test_stopped_and_run_again(
    point: str, stage: str, step: int, output: bool, finished: Path, prefix: Any, tmp_path: Path,
    injected: Injected,
) -> None:  # fmt: skip
    # The other stages are copied from the uninterrupted run; the slow tests run all of them.
    run_dir = prefix(tmp_path, stage)
    run_until(point, lambda: tiny.run(tmp_path, only={stage}))
    assert_stopped_there(run_dir, stage, step, output)
    tiny.run(tmp_path, only={stage})
    assert_like_straight(run_dir, finished, [stage])
    injected(f"an exception at {point}", "survived")


@pytest.mark.slow
def test_stopped_again_and_again(finished: Path, tmp_path: Path, injected: Injected) -> None:
    points = ["step:code:2", "step:general:5", "step:dpo:2", "begin:rpo-2"]
    for point in points:
        run_until(point, lambda: tiny.run(tmp_path))
    tiny.run(tmp_path)
    assert_like_straight(tmp_path / "run", finished)
    injected(f"exceptions at {', '.join(points)}", "survived")


@pytest.mark.slow
def test_without_checkpoints_a_stage_starts_again(finished: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["defaults"]["save_steps"] = None
    for point in ("evaluated:code", "step:dpo:2"):
        run_until(point, lambda: tiny.run(tmp_path, recipe))
    tiny.run(tmp_path, recipe)
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))
    assert_like_straight(tmp_path / "run", finished)


def test_a_damaged_checkpoint_is_passed_over_and_removed(
    finished: Path, prefix: Any, tmp_path: Path, injected: Injected,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run_dir = prefix(tmp_path, "rpo-1")
    recipe = tiny.changed(tiny.tiny_recipe(), "rpo.save_total_limit", 3)
    run_until("step:rpo-1:2", lambda: tiny.run(tmp_path, recipe))
    for step in (1, 2):  # both: the stage starts over
        (run_dir / "rpo-1" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"x")
    # A damaged later one must not make the rotation remove the intact ones that follow.
    run_until("step:rpo-1:1", lambda: tiny.run(tmp_path))
    assert "checkpoint-2 is damaged" in caplog.text
    assert last_step(run_dir, "rpo-1") == 1
    tiny.run(tmp_path, only={"rpo-1"})
    assert_like_straight(run_dir, finished, ["rpo-1"])
    injected("both checkpoints of rpo-1 damaged, and an exception at step:rpo-1:1", "survived")


def test_a_damaged_reference_cache_is_computed_again(
    finished: Path, prefix: Any, tmp_path: Path, injected: Injected,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run_dir = prefix(tmp_path, "dpo")
    run_until("step:dpo:1", lambda: tiny.run(tmp_path))
    (part,) = (run_dir / "reference-cache").rglob("part-*")
    part.write_bytes(part.read_bytes()[:-20])
    tiny.run(tmp_path, only={"dpo"})
    assert "is damaged" in caplog.text
    assert_like_straight(run_dir, finished, ["dpo"])
    injected("reference cache of dpo, cut", "survived")


def test_a_line_of_metrics_that_was_cut_is_repaired(
    finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    run_dir = prefix(tmp_path, "dpo")
    run_until("step:dpo:2", lambda: tiny.run(tmp_path))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "dpo", "st')
    tiny.run(tmp_path, only={"dpo"})
    assert_like_straight(run_dir, finished, ["dpo"])
    injected("a line of metrics.jsonl cut", "survived")


# --- by SIGKILL, in a separate process, the entire chain ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "stage", "step", "output"), [pytest.param(*p, id=p[0]) for p in POINTS]
)
def test_killed_and_run_again(
    point: str, stage: str, step: int, output: bool, finished: Path, tmp_path: Path,
    injected: Injected,
) -> None:  # fmt: skip
    tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    assert in_process(tmp_path, point) == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert (tmp_path / MARKER).read_text() == point
    assert_stopped_there(tmp_path / "run", stage, step, output)
    assert in_process(tmp_path, None) == 0, (tmp_path / "output").read_text()
    assert_like_straight(tmp_path / "run", finished)
    injected(f"SIGKILL at {point}", "survived")


def in_background() -> tiny.Recipe:
    recipe = tiny.tiny_recipe()
    for stage in recipe["stages"]:
        stage["training_args"] = {**stage.get("training_args", {}), "async_save": True}
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "file:general/.staging/checkpoint-3/model.safetensors",
        "file:general/.staging/checkpoint-3/optimizer.pt",
        "replace:general/.staging/checkpoint-3/manifest.json",
        "replace:general/checkpoint-3",
    ],
)
def test_killed_while_a_thread_writes_a_checkpoint(
    point: str, finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    tiny.write_recipe(tmp_path, in_background())
    run_dir = prefix(tmp_path, "general")
    command = ("sft", "--stage", "general")
    assert in_process(tmp_path, point, signal.SIGKILL, *command) == -signal.SIGKILL
    assert (tmp_path / MARKER).read_text() == point
    assert_stopped_there(run_dir, "general", 2, False)
    assert in_process(tmp_path, None, 0, *command) == 0, (tmp_path / "output").read_text()
    assert_like_straight(run_dir, finished, ["general"])
    injected(f"SIGKILL at {point}, async_save", "survived")


@pytest.mark.slow
def test_a_signal_waits_for_the_thread_that_writes(
    finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    tiny.write_recipe(tmp_path, in_background())
    run_dir = prefix(tmp_path, "general")
    command = ("sft", "--stage", "general")
    assert in_process(tmp_path, "step:general:2", signal.SIGTERM, *command) == 75
    assert_stopped_there(run_dir, "general", 3, False)
    assert in_process(tmp_path, None, 0, *command) == 0
    assert_like_straight(run_dir, finished, ["general"])
    injected("SIGTERM at step:general:2, async_save", "survived")


@pytest.mark.slow
def test_killed_at_random_moments(finished: Path, tmp_path: Path, injected: Injected) -> None:
    """One chain, killed repeatedly at arbitrary points until it finishes."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    print(f"KILL_SEED={seed}")  # shown with a failure, for analysis
    draw = random.Random(seed)
    tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    kills: list[float] = []
    latest = 6.0
    while len(kills) < 12:
        if killed_after(tmp_path, moment := draw.uniform(1.0, latest)) != 0:
            kills.append(moment)
        elif kills:
            break
        else:  # it finished before the first kill: a fast machine
            shutil.rmtree(tmp_path / "run")
            latest = max(1.0, latest / 2)
    assert in_process(tmp_path, None) == 0, (tmp_path / "output").read_text()
    assert_like_straight(tmp_path / "run", finished)
    for moment in kills:
        injected(f"SIGKILL after {moment:.2f} s (KILL_SEED={seed})", "survived")


@pytest.mark.slow
def test_killed_in_training_and_while_sampling(
    finished: Path, tmp_path: Path, injected: Injected
) -> None:
    """Two points of the slow matrix, for the fast suite."""
    tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    for point in ("step:general:3", "generated:5"):
        assert in_process(tmp_path, point) == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert (tmp_path / MARKER).read_text() == point
    holder = (tmp_path / "run" / ".lock-holder").read_text()
    assert holder.startswith("process ")  # nothing could clean up
    assert tiny.records(tmp_path / "run")["dpo"]["state"] == "done"
    assert in_process(tmp_path, None) == 0, (tmp_path / "output").read_text()
    assert_like_straight(tmp_path / "run", finished)
    injected("SIGKILL at step:general:3, and again at generated:5", "survived")


# --- SIGTERM ---


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_by_a_signal_in_training(
    number: signal.Signals, finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    recipe = tiny.tiny_recipe()
    recipe["defaults"]["save_steps"] = None  # the only checkpoint is the signal's
    tiny.write_recipe(tmp_path, recipe)
    run_dir = prefix(tmp_path, "general")
    command = ("sft", "--stage", "general")
    assert in_process(tmp_path, "step:general:2", number, *command) == 75
    output = (tmp_path / "output").read_text()
    assert "[run.stopped-by-signal]" in output and "Traceback" not in output
    assert number.name in output
    assert_stopped_there(run_dir, "general", 3, False)  # the current step is finished
    assert tiny.records(run_dir)["general"]["state"] == "running"
    seconds = tiny.records(run_dir)["general"]["seconds"]
    assert seconds > 0
    assert not (run_dir / ".lock-holder").exists()
    assert in_process(tmp_path, None, 0, *command) == 0
    assert tiny.records(run_dir)["general"]["seconds"] > seconds  # both parts count
    assert_like_straight(run_dir, finished, ["general"])
    injected(f"{number.name} at step:general:2", "survived")


def test_stopped_by_a_second_signal_within_a_step(
    finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    run_dir = prefix(tmp_path, "general")

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with at("step:general:2", twice), pytest.raises(StoppedBySignal, match="SIGINT"):
        tiny.run(tmp_path, only={"general"})
    assert_stopped_there(run_dir, "general", 2, False)  # the current step is not finished
    tiny.run(tmp_path, only={"general"})
    assert_like_straight(run_dir, finished, ["general"])
    injected("SIGINT twice at step:general:2", "survived")


@pytest.mark.parametrize(
    "point",
    [
        "generated:2",
        pytest.param("replaced:dpo/generated-", marks=pytest.mark.slow),
        pytest.param("begin:dpo", marks=pytest.mark.slow),
        pytest.param("replace:reference-cache", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal_outside_of_training(
    point: str, finished: Path, prefix: Any, tmp_path: Path, injected: Injected
) -> None:
    tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    run_dir = prefix(tmp_path, "dpo")
    assert in_process(tmp_path, point, signal.SIGTERM, "dpo") == 75
    output = (tmp_path / "output").read_text()
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    assert_stopped_there(run_dir, "dpo", 0, False)
    tiny.run(tmp_path, only={"dpo"})
    assert_like_straight(run_dir, finished, ["dpo"])
    injected(f"SIGTERM at {point}", "survived")


@pytest.mark.parametrize(
    "point", ["evaluated:code", pytest.param("replace:code/final", marks=pytest.mark.slow)]
)
def test_after_the_last_step_the_output_is_still_written(
    point: str, finished: Path, tmp_path: Path, injected: Injected
) -> None:
    recipe = tiny.tiny_recipe()
    recipe["defaults"]["save_steps"] = None  # there is no checkpoint to resume from
    tiny.write_recipe(tmp_path, recipe)
    assert in_process(tmp_path, point, signal.SIGTERM) == 75
    run_dir = tmp_path / "run"
    assert_stopped_there(run_dir, "code", 0, True)
    assert "eval_after" in tiny.records(run_dir)["code"]
    written = tiny.content(run_dir / "code" / "final")
    tiny.run(tmp_path, only={"code"})
    after = tiny.content(run_dir / "code" / "final")
    assert {*after} - {*written} == {"README.md"}  # the card, and its line in the manifest
    weights = {*written} - {"manifest.json"}
    assert {name: after[name] for name in weights} == {name: written[name] for name in weights}
    assert_like_straight(run_dir, finished, ["code"])
    injected(f"SIGTERM at {point}", "survived")
