"""A whole chain on two ranks under every engine: as on one, killed and resumed, stopped by a signal."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.chain import tiny
from tests.distributed.launch import require, run, torchrun
from tests.distributed.worker import ENGINES, engine_settings

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

STAGES = ("code", "rpo")
WORKER = "tests.distributed.chain_worker"


def recipe(engine: str, **defaults: Any) -> tiny.Recipe:
    """SFT with held-out rows, then RPO on sampled responses; prompts are answered after each."""
    made = tiny.tiny_recipe()
    made["stages"] = [tiny.stage_of(made, name) for name in STAGES]
    made["defaults"] |= {"micro_batch_size": 4, "save_total_limit": 2, **defaults}
    tiny.stage_of(made, "code")["max_steps"] = 4
    tiny.stage_of(made, "rpo").pop("repeat")
    for stage in made["stages"]:
        stage["training_args"] = {"adam_epsilon": 1e-3}
        if engine not in ("none", "ddp"):
            stage["training_args"] |= engine_settings(engine)
    made["eval"] = {
        "data": [tiny.task("general", "heldout", 12)],
        "generate": {"responses": 2, "max_new_tokens": 5, "batch_size": 8},
        "score": {"verifier": "partial_match"},
    }
    return made


def start(folder: Path, *end: str, ranks: int = 2, restarts: int = 0) -> tuple[int, str]:
    """Exit code and output of the launcher."""
    command = torchrun(WORKER, str(folder), *end, ranks=ranks, restarts=restarts)
    ended = run(command)
    return ended.returncode, ended.stdout


def exits(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("exit-*"))]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{stage}.{name}": tensor
        for stage in STAGES
        for name, tensor in load_file(folder / "run" / stage / "final/model.safetensors").items()
    }


def furthest(first: Path, second: Path) -> float:
    """Largest difference of the weights of all stages."""
    a, b = final_weights(first), final_weights(second)
    assert a.keys() == b.keys()
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("one")
    tiny.write_recipe(folder, recipe("none"))
    ended = run([sys.executable, "-m", WORKER, str(folder)])
    assert ended.returncode == 0, ended.stdout[-3000:]
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of two ranks under an engine that nobody has disturbed."""
    known: dict[str, Path] = {}

    def of(engine: str) -> Path:
        require(engine)
        if engine not in known:
            folder = tmp_path_factory.mktemp(engine)
            tiny.write_recipe(folder, recipe(engine))
            code, output = start(folder)
            assert code == 0, output[-5000:]
            known[engine] = folder
        return known[engine]

    return of


def text(folder: Path, pattern: str) -> list[str]:
    return [path.read_text() for path in sorted((folder / "run").glob(pattern))]


def sampled(folder: Path) -> list[list[Any]]:
    return [
        [json.loads(line)["responses"] for line in lines.splitlines()]
        for lines in text(folder, "rpo/generated-*.jsonl")
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_leave_what_one_leaves(engine: str, one: Path, straight: Any) -> None:
    two = straight(engine)
    assert exits(two) == ["0", "0"]
    assert furthest(two, one) <= 1e-5
    # Responses do not depend on who has sampled them.
    assert len(sampled(one)) == 1 and sampled(two) == sampled(one)
    assert text(two, "*/samples.jsonl") == text(one, "*/samples.jsonl")
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
    assert len(text(two, "rpo/gaps.jsonl")[0]) == len(text(one, "rpo/gaps.jsonl")[0])
    assert not list((two / "run").glob("*/.*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_rank_and_the_launcher_goes_on(engine: str, straight: Any, tmp_path: Path) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, recipe(engine))
    code, output = start(tmp_path, "1", str(int(signal.SIGKILL)), "step:rpo:2", restarts=1)
    assert code == 0, output[-5000:]
    assert furthest(tmp_path, straight(engine)) == 0.0
    steps = tiny.metric_steps(tmp_path / "run", "rpo")
    assert [step for step, _ in steps] == [1, 2, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_to_one_rank_stops_all_at_one_step(engine: str, one: Path, tmp_path: Path) -> None:
    require(engine)
    # No checkpoints on the way: the one there is was written for the signal.
    made = recipe(engine, save_steps=None)
    tiny.write_recipe(tmp_path, made)
    start(tmp_path, "1", str(int(signal.SIGTERM)), "step:code:2")
    assert exits(tmp_path) == ["75", "75"]
    (saved,) = (tmp_path / "run" / "code").glob("checkpoint-*")
    assert saved.name == "checkpoint-3"  # the step in hand was finished
    assert tiny.records(tmp_path / "run")["code"]["state"] == "running"
    # The same run on another number of ranks: where the engine can, it goes on.
    code, output = start(tmp_path, ranks=1)
    if engine.startswith("zero"):
        assert exits(tmp_path)[0] == "2"
        assert f"was written by {engine} on 2 ranks" in output
    else:
        assert code == 0, output[-5000:]
        assert furthest(tmp_path, one) <= 1e-5


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("missing", "3", "there is no such file on this host"),
        ("fewer", "2", "the processes have made different examples of stage code"),
    ],
)
def test_an_error_of_one_rank_ends_both_and_is_shown_once(
    fault: str, code: str, message: str, tmp_path: Path
) -> None:
    tiny.write_recipe(tmp_path, recipe("ddp"))
    _, output = start(tmp_path, "1", "rows", fault)
    assert exits(tmp_path) == [code, code]
    assert output.count(message) == 1, output[-3000:]
    assert "Traceback" not in output.split("distributed/elastic")[0]
