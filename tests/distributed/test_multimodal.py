"""A multimodal checkpoint with frozen towers on two ranks, under each engine: as on one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from tests.chain import tiny
from tests.distributed.chains import STAGES, final_weights, furthest, launched, recipe, start
from tests.distributed.launch import require

pytestmark = pytest.mark.slow

LLAVA = {
    "model_type": "llava",
    "text_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "projection_dim": 32,
    },
}  # fmt: skip


def multimodal(engine: str) -> tiny.Recipe:
    made = recipe(engine)
    made["model"]["from_config"] = LLAVA
    return made


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    tiny.write_recipe(folder, multimodal("none"))
    return launched(shlex.split("python -m rpo_trainer run"), folder)


@pytest.mark.parametrize("engine", ["none", "fsdp2", "zero3"])
def test_frozen_towers_on_two_ranks(one: Path, engine: str, tmp_path: Path) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, multimodal(engine))
    code, output = start(tmp_path)
    assert code == 0, output[-5000:]
    assert furthest(one, tmp_path) < 1e-4
    weights = final_weights(tmp_path, STAGES)
    towers = [name for name in weights if "vision" in name or "projector" in name]
    assert towers
    for name in towers:
        assert torch.equal(weights[name], final_weights(one, STAGES)[name])
        assert torch.equal(weights[name], weights["code." + name.partition(".")[2]])
