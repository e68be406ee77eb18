"""A chain of LoRA stages on two ranks equals that on one: merged, created again, kept, and merged copies."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpo_trainer.models import adapter_files
from tests.chain import tiny
from tests.distributed.chains import launched, recipe, start
from tests.distributed.launch import require

pytestmark = pytest.mark.slow

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SPECS = {
    "code": {**LORA, "target_modules": ["q_proj", "lm_head"]},
    "dpo": {**LORA, "between_stages": "keep"},
    "rpo": {**LORA, "between_stages": "keep", "merge": True},
}
# What each stage writes; `code` is merged, and its adapter is next to it.
LEFT = (
    "code/adapter/adapter_model.safetensors", "code/final/model.safetensors",
    "dpo/final/adapter_model.safetensors", "rpo/final/adapter_model.safetensors",
    "rpo/merged/model.safetensors",
)  # fmt: skip


def adapted(engine: str) -> tiny.Recipe:
    made = recipe(engine, stages=tuple(SPECS))
    del made["eval"]
    for stage in made["stages"]:
        stage |= {"peft": SPECS[stage["name"]], "learning_rate": 1e-2}
    return made


def alone(folder: Path, made: tiny.Recipe) -> Path:
    """The run of one process."""
    tiny.write_recipe(folder, made)
    return launched(shlex.split("python -m rpo_trainer run"), folder) / "run"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(tmp_path_factory.mktemp("one"), adapted("none"))


def in_4_bits(engine: str) -> tiny.Recipe:
    """SFT of all weights, then RPO of an adapter on them in 4 bits."""
    pytest.importorskip("bitsandbytes")
    made = recipe(engine)
    del made["eval"]
    peft = {**LORA, "between_stages": "keep", "quantization": "nf4"}
    tiny.stage_of(made, "rpo").update(peft=peft, learning_rate=1e-2)
    return made


@pytest.fixture(scope="module")
def one_qlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(tmp_path_factory.mktemp("one_qlora"), in_4_bits("none"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_leave_what_one_leaves(engine: str, one: Path, tmp_path: Path) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, adapted(engine))
    code, output = start(tmp_path)
    assert code == 0, output[-5000:]
    for name in LEFT:
        mine, alone = load_file(tmp_path / "run" / name), load_file(one / name)
        assert mine.keys() == alone.keys(), name
        for key, tensor in alone.items():
            torch.testing.assert_close(mine[key], tensor, atol=1e-5, rtol=0)
    a, b = (load_file(one / f"{name}/final" / adapter_files.WEIGHTS) for name in ("dpo", "rpo"))
    assert max((a[key] - b[key]).abs().max() for key in a) > 1e-3  # the second stage resumes
    for name in ("dpo", "rpo"):
        check = tiny.records(tmp_path / "run")[name]["step0"]
        assert check["ok"] and check["nats_per_token"] < 1e-5


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_qlora_on_two_ranks_is_that_of_one(engine: str, one_qlora: Path, tmp_path: Path) -> None:
    require(engine)
    tiny.write_recipe(tmp_path, in_4_bits(engine))
    code, output = start(tmp_path)
    assert code == 0, output[-5000:]
    name = f"rpo/final/{adapter_files.WEIGHTS}"
    mine, alone = load_file(tmp_path / "run" / name), load_file(one_qlora / name)
    for key, tensor in alone.items():
        torch.testing.assert_close(mine[key], tensor, atol=1e-5, rtol=0)
    assert max(tensor.abs().max() for key, tensor in alone.items() if "lora_B" in key) > 1e-3
    check = tiny.records(tmp_path / "run")["rpo"]["step0"]
    assert check["ok"] and check["nats_per_token"] < 1e-5


def in_bfloat16(engine: str) -> tiny.Recipe:
    """A merged and a kept adapter, on frozen weights in the dtype of the computation."""
    made = adapted(engine)
    made["model"]["dtype"] = "bfloat16"
    return made


@pytest.fixture(scope="module")
def one_in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(tmp_path_factory.mktemp("one_bfloat16"), in_bfloat16("none"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_frozen_bfloat16_weights_below_float32_adapters(
    engine: str, one_in_bfloat16: Path, tmp_path: Path
) -> None:
    """FSDP2 shards both dtypes; DeepSpeed holds the rounded weights in float32."""
    require(engine)
    tiny.write_recipe(tmp_path, in_bfloat16(engine))
    code, output = start(tmp_path)
    assert code == 0, output[-5000:]
    for name in LEFT:
        mine, alone = load_file(tmp_path / "run" / name), load_file(one_in_bfloat16 / name)
        assert mine.keys() == alone.keys(), name
        for key, tensor in alone.items():
            assert mine[key].dtype == torch.float32 or "base_layer" in key
            # Adam turns the rounding of small gradients into steps: single weights may differ by them.
            assert (mine[key].float() - tensor.float()).abs().mean() < 0.02, (name, key)
    for record in tiny.records(tmp_path / "run").values():
        if record["kind"] != "sft":
            assert record["step0"]["ok"]
