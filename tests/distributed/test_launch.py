"""The launchers and the configurations that the README names, each with a short chain on two ranks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file

from tests.chain import tiny
from tests.distributed.launch import ROOT, free_port, require, run
from tests.models import make_model

CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "recipes/deepspeed").glob("*.json"))
SITE = str(Path(__file__).parent / "site")


def test_what_is_shipped() -> None:
    assert [path.stem for path in CONFIGS] == [
        "ddp", "fsdp2", "multi_node", "single", "zero2", "zero3", "zero3_offload",
    ]  # fmt: skip
    assert [path.stem for path in DEEPSPEED] == ["zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.mixed_precision in (None, "no")  # else it would contradict the recipe's dtype
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
    if config.deepspeed_config:
        assert ROOT / config.deepspeed_config["deepspeed_config_file"] in DEEPSPEED


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_settings_follow_the_recipe(path: Path) -> None:
    settings = json.loads(path.read_text())
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[name] == "auto"
    assert settings["gradient_clipping"] == "auto"
    assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"}
    assert settings["zero_optimization"]["stage"] == int(re.findall(r"\d", path.stem)[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, and the recipe of a preference stage on responses that it gives."""
    folder = tmp_path_factory.mktemp("launch")
    make_model(vocab_size=100).save_pretrained(folder / "model")
    tiny.write_recipe(folder, recipe(folder))
    return folder


def recipe(folder: Path, **training_args: Any) -> tiny.Recipe:
    made = tiny.tiny_recipe()
    made["model"] = {
        "name_or_path": str(folder / "model"), "tokenizer": "characters", "dtype": "float32",
    }  # fmt: skip
    stage = tiny.stage_of(made, "dpo")
    stage |= {"init": "model", "max_steps": 2, "max_length": 100}
    stage["training_args"] = {"adam_epsilon": 1e-3, **training_args}
    made["stages"] = [stage]
    made["defaults"]["micro_batch_size"] = 4
    return made


@pytest.fixture(scope="module")
def expected(made: Path) -> dict[str, torch.Tensor]:
    """What one process makes of it."""
    return finish(made, shlex.split("python -m rpo_trainer run"), made / "alone")


def finish(folder: Path, command: list[str], run_dir: Path) -> dict[str, torch.Tensor]:
    arguments = [str(folder / "recipe.yaml"), "--run-dir", str(run_dir), "--no-report"]
    ended = run([*command, *arguments], PYTHONPATH=SITE)
    assert ended.returncode == 0, ended.stdout[-5000:]
    # One process speaks and one writes.
    assert ended.stdout.count("[1/1 dpo] finished") == 1
    return load_file(run_dir / "dpo/final/model.safetensors")


def assert_same(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config", ["single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"], ids=str
)
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_accelerate_launch(config: str, made: Path, expected: Any, tmp_path: Path) -> None:
    require(config)
    command = shlex.split(readme_command("accelerate"))
    command[command.index("--config_file") + 1] = f"recipes/accelerate/{config}.yaml"
    ranks = ["--main_process_port", str(free_port())]
    ranks += [] if config == "single" else ["--num_processes", "2"]
    command[2:2] = ranks
    assert_same(finish(made, command, tmp_path / "run"), expected)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_torchrun(made: Path, expected: Any, tmp_path: Path) -> None:
    command = shlex.split(readme_command("torchrun").replace("per_node 8", "per_node 2"))
    command[1:1] = ["--master_port", str(free_port())]
    assert_same(finish(made, command, tmp_path / "run"), expected)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_deepspeed(made: Path, expected: Any, tmp_path: Path) -> None:
    require("zero3")
    folder = tmp_path / "recipe"
    tiny.write_recipe(folder, recipe(made, deepspeed=str(ROOT / "recipes/deepspeed/zero3.json")))
    command = shlex.split(readme_command("deepspeed").replace("num_gpus 8", "num_gpus 2"))
    command[1:1] = ["--master_port", str(free_port())]
    assert_same(finish(folder, command, tmp_path / "run"), expected)


def readme_command(launcher: str) -> str:
    """The README's command line of a launcher, without the recipe."""
    pattern = rf"^ *({launcher} .* run) RECIPE"
    (found,) = re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE)
    return str(found)
