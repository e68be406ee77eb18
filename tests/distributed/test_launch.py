"""The shipped files for accelerate and DeepSpeed as these libraries read them; for runs see test_chain.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from tests.distributed.launch import ROOT

CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "recipes/deepspeed").glob("*.json"))


def test_what_is_shipped() -> None:
    assert [path.stem for path in CONFIGS] == [
        "ddp", "fsdp2", "multi_node", "single", "zero2", "zero3", "zero3_offload",
    ]  # fmt: skip
    assert [path.stem for path in DEEPSPEED] == ["zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.mixed_precision in (
        None,
        "no",
    )  # otherwise it would contradict the recipe's dtype
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
