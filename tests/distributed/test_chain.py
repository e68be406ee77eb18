"""An entire chain on two ranks under every engine: as on one, killed and resumed, stopped by a signal."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chain import tiny
from tests.conftest import Injected
from tests.distributed.chains import exits, final_weights, furthest, launched, recipe, start, text
from tests.distributed.launch import accelerate, by_launcher, require
from tests.distributed.worker import ENGINES

pytestmark = pytest.mark.slow

# The shipped configurations that two processes can run; the others are DDP over hosts, and one process.
# For its offload DeepSpeed compiles an optimizer, which takes minutes.
CONFIGS = ("single", *ENGINES, pytest.param("zero3_offload", marks=pytest.mark.long))


def sampled(folder: Path) -> list[list[Any]]:
    return [
        [json.loads(line)["responses"] for line in lines.splitlines()]
        for lines in text(folder, "rpo/generated-*.jsonl")
    ]


def gaps(folder: Path) -> list[dict[str, Any]]:
    (lines,) = text(folder, "rpo/gaps.jsonl")
    return [json.loads(line) for line in lines.splitlines()]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for lines in text(folder, "*/samples.jsonl") for line in lines.splitlines()
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_accelerate_launch_leaves_what_one_process_leaves(
    config: str, one: Path, straight: Any
) -> None:
    two = straight(config)
    assert furthest(two, one) <= 1e-5
    # Responses do not depend on which rank samples them.
    assert len(sampled(one)) == 1 and sampled(two) == sampled(one)
    for a, b in zip(samples(two), samples(one), strict=True):
        ratios = a.pop("log_ratios", None)
        assert ratios == pytest.approx(b.pop("log_ratios", None), abs=1e-3) and a == b
    assert text(two, "*/final/config.json") == text(one, "*/final/config.json")
    mine, alone = tiny.metrics(two / "run"), tiny.metrics(one / "run")
    assert [(m["stage"], m["step"]) for m in mine] == [(m["stage"], m["step"]) for m in alone]
    for a, b in zip(mine, alone, strict=True):
        name = "loss" if "loss" in b else "eval_loss"
        assert a[name] == pytest.approx(b[name], abs=1e-5)
    for name, record in tiny.records(one / "run").items():
        other = tiny.records(two / "run")[name]
        assert other["data"] == record["data"] and other["examples"] == record["examples"]
        assert other["eval"]["reward_mean"] == record["eval"]["reward_mean"]
    for a, b in zip(gaps(two), gaps(one), strict=True):
        assert a["id"] == b["id"] and a["target_gap"] == b["target_gap"]
        assert a["implicit_gap"] == pytest.approx(b["implicit_gap"], abs=1e-4)
    assert not list((two / "run").glob("*/.*"))


def test_a_bfloat16_chain_under_zero3_is_near_that_of_one_process(tmp_path: Path) -> None:
    require("zero3")
    made = recipe("none")
    made["model"]["dtype"] = "bfloat16"
    alone, two = tmp_path / "alone", tmp_path / "two"
    for folder, command in (
        (alone, shlex.split("python -m rpo_trainer run")), (two, accelerate("zero3")),
    ):  # fmt: skip
        folder.mkdir()
        tiny.write_recipe(folder, made)
        launched(command, folder)
    assert 0 < furthest(two, alone) <= 5e-3
    for name, weight in final_weights(two, ("code", "rpo")).items():
        assert not torch.equal(weight, weight.bfloat16().float()), name  # kept in full
    step_zero = tiny.records(two / "run")["rpo"]["step0"]
    assert step_zero["ok"] and step_zero["nats_per_token"] < 0.02


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_then_stopped_then_gone_on(
    engine: str, one: Path, straight: Any, tmp_path: Path, injected: Injected
) -> None:
    require(engine)
    # RPO writes no intermediate checkpoints: the existing one was written for the signal.
    made = recipe(engine, save_steps=None)
    tiny.stage_of(made, "code")["save_steps"] = 1
    tiny.write_recipe(tmp_path, made)
    killed, stopped = str(int(signal.SIGKILL)), str(int(signal.SIGTERM))
    _, output = start(tmp_path, "1", killed, "step:code:2", stopped, "step:rpo:1", restarts=1)
    assert exits(tmp_path) == ["75", "75"], output[-5000:]
    # The launcher has resumed the run automatically, bit for bit.
    assert furthest(tmp_path, straight(engine), ("code",)) == 0.0
    code = [step for step, _ in tiny.metric_steps(tmp_path / "run", "code")]
    assert code == [step for step, _ in tiny.metric_steps(one / "run", "code")]
    (saved,) = (tmp_path / "run" / "rpo").glob("checkpoint-*")
    assert saved.name == "checkpoint-2"  # the current step was finished
    assert tiny.records(tmp_path / "run")["rpo"]["state"] == "running"

    # Under another launcher a run resumes bit for bit with as many ranks, or with another number of ranks.
    if engine in ("ddp", "fsdp2"):
        launched(by_launcher("torchrun", "--nproc_per_node", ranks=1), tmp_path)
        assert furthest(tmp_path, one) <= 1e-5
    else:
        if engine == "zero3":
            _, output = start(tmp_path, ranks=1)
            assert exits(tmp_path)[0] == "2"
            assert "[run.other-engine]" in output and "zero3 on 2" in output
            launched(by_launcher("deepspeed", "--num_gpus"), tmp_path)
        else:
            launched(by_launcher("torchrun", "--nproc_per_node"), tmp_path)
        assert furthest(tmp_path, straight(engine)) == 0.0
    injected(f"{engine}: SIGKILL to a rank at step:code:2", "survived")
    injected(f"{engine}: SIGTERM to a rank at step:rpo:1", "survived")


def test_stopped_all_at_once_and_gone_on(straight: Any, tmp_path: Path, injected: Injected) -> None:
    """As a scheduler does: every rank gets the signal."""
    made = recipe("ddp", save_steps=None)
    made["stages"] = made["stages"][:1]
    del made["eval"]
    tiny.write_recipe(tmp_path, made)
    _, output = start(tmp_path, "all", str(int(signal.SIGTERM)), "step:code:2")
    assert exits(tmp_path) == ["75", "75"], output[-5000:]
    (saved,) = (tmp_path / "run" / "code").glob("checkpoint-*")
    assert saved.name == "checkpoint-3"  # the current step was finished
    assert tiny.records(tmp_path / "run")["code"]["state"] == "running"
    assert start(tmp_path)[0] == 0
    assert furthest(tmp_path, straight("ddp"), ("code",)) == 0.0
    injected("ddp: SIGTERM to all ranks at step:code:2", "survived")


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("missing", "3", "there is no such file on this host"),
        ("fewer", "2", "[run.different-examples]"),
        ("nan", "4", "[training.not-finite]"),
    ],
)
def test_an_error_of_one_rank_ends_both_and_is_shown_once(
    fault: str, code: str, message: str, tmp_path: Path, injected: Injected
) -> None:
    tiny.write_recipe(tmp_path, recipe("ddp"))
    _, output = start(tmp_path, "1", "fault", fault)
    assert exits(tmp_path) == [code, code]
    assert output.count(message) == 1, output[-3000:]
    assert "Traceback" not in output.split("distributed/elastic")[0]
    injected(f"ddp: one rank, {message}", "stopped")


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_rank_that_breaks_ends_the_others(
    engine: str, tmp_path: Path, injected: Injected
) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, recipe(engine))
    code, output = start(tmp_path, "1", "fault", "breaks")
    # The other rank loses the connection, or the launcher ends it.
    assert code == 1 and set(exits(tmp_path)) <= {"1"}
    assert "RuntimeError: the device of this rank is broken" in output
    injected(f"{engine}: an exception in one rank's forward", "stopped")
