"""Short chains for runs on several ranks, and readers of their outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.chain import tiny
from tests.distributed.launch import run, torchrun

STAGES = ("code", "rpo")
WORKER = "tests.distributed.chain_worker"


def recipe(engine: str, *, stages: tuple[str, ...] = STAGES, **defaults: Any) -> tiny.Recipe:
    """SFT with held-out rows, then RPO on sampled responses; prompts are answered after each.

    Args:
        engine: the engine that the recipe sets, as in the README; `none`: no engine.
        defaults: values of `defaults`.
    """
    made = tiny.tiny_recipe()
    made["stages"] = [tiny.stage_of(made, name) for name in stages]
    made["defaults"] |= {"micro_batch_size": 4, "save_total_limit": 2, **defaults}
    tiny.stage_of(made, "code")["max_steps"] = 4
    tiny.stage_of(made, "rpo").pop("repeat")
    for stage in made["stages"]:
        stage["training_args"] = {"adam_epsilon": 1e-3}
        if engine == "fsdp2":
            stage["training_args"]["fsdp"] = True
        elif engine.startswith("zero"):
            stage["training_args"]["deepspeed"] = f"recipes/deepspeed/{engine}.json"
    made["eval"] = {
        "data": [tiny.task("general", "heldout", 12)],
        "generate": {"responses": 2, "max_new_tokens": 5, "batch_size": 8},
        "score": {"verifier": "partial_match"},
    }
    return made


def start(folder: Path, *happens: str, ranks: int = 2, restarts: int = 0) -> tuple[int, str]:
    """Return exit code and output of torchrun; `happens`: see `chain_worker`."""
    command = torchrun(WORKER, str(folder), *happens, ranks=ranks, restarts=restarts)
    ended = run(command)
    return ended.returncode, ended.stdout


def launched(command: list[str], folder: Path) -> Path:
    """Run the recipe in `folder` to its end by a launcher's command line, and return the directory."""
    arguments = [f"{folder}/recipe.yaml", "--run-dir", f"{folder}/run", "--no-report"]
    site = str(Path(__file__).parent / "site")
    ended = run([*command, *arguments], PYTHONPATH=site)
    assert ended.returncode == 0, ended.stdout[-5000:]
    # One process prints and one writes.
    finished = re.findall(r"(\S+)\] finished", ended.stdout)
    assert finished and len(finished) == len(set(finished)), ended.stdout[-5000:]
    return folder


def exits(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("exit-*"))]


def final_weights(folder: Path, stages: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {
        f"{stage}.{name}": tensor
        for stage in stages
        for name, tensor in load_file(folder / "run" / stage / "final/model.safetensors").items()
    }


def furthest(first: Path, second: Path, stages: tuple[str, ...] = STAGES) -> float:
    """Return the largest difference of the weights of the stages."""
    a, b = final_weights(first, stages), final_weights(second, stages)
    assert a.keys() == b.keys()
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}
    return max((a[name] - b[name]).abs().max().item() for name in a)


def text(folder: Path, pattern: str) -> list[str]:
    return [path.read_text() for path in sorted((folder / "run").glob(pattern))]
