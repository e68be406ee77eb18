"""A multimodal checkpoint with frozen towers on two ranks, under each engine, equals that on one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.models.loading import load_model, load_weights
from rpo_trainer.recipe import ModelSpec
from tests.chain import tiny
from tests.distributed.chains import STAGES, launched, recipe, start
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


def multimodal(engine: str, checkpoint: Path) -> tiny.Recipe:
    made = recipe(engine)
    made["model"] = {"name_or_path": str(checkpoint), "dtype": "float32"}
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("llava"), character_tokenizer()
    spec = ModelSpec.model_validate({"from_config": LLAVA, "tokenizer": "characters"})
    load_model(spec, folder, seed=0, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    tiny.write_recipe(folder, multimodal("none", checkpoint))
    return launched(shlex.split("python -m rpo_trainer run"), folder)


@pytest.mark.parametrize("engine", ["none", "fsdp2", "zero3"])
def test_frozen_towers_on_two_ranks(
    checkpoint: Path, one: Path, engine: str, tmp_path: Path
) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, multimodal(engine, checkpoint))
    code, output = start(tmp_path)
    assert code == 0, output[-5000:]
    start_weights = load_weights(checkpoint).state_dict()
    towers = [name for name in start_weights if "vision" in name or "projector" in name]
    assert towers
    for stage in STAGES:
        expected, found = (
            load_weights(folder / "run" / stage / "final").state_dict()
            for folder in (one, tmp_path)
        )
        assert max((expected[n] - t).abs().max().item() for n, t in found.items()) < 1e-4
        assert all(torch.equal(found[name], start_weights[name]) for name in towers)
    names = load_file(checkpoint / "model.safetensors").keys()
    assert load_file(tmp_path / "run" / STAGES[-1] / "final/model.safetensors").keys() == names
