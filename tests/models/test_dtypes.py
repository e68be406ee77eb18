"""Frozen weights in a lower dtype below a float32 adapter, and model directories copied in another dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rpo_trainer.models import adapters
from rpo_trainer.models.delivered import copy_in_dtype
from rpo_trainer.models.dtypes import (
    cast_frozen,
    cast_weights,
    dtype_name,
    kept_in_float32,
    round_weights,
)
from rpo_trainer.models.from_config import make_random_model
from rpo_trainer.models.weight_files import stored_dtype
from tests.small_models import make_model

peft = pytest.importorskip("peft")

BF16 = torch.bfloat16
IDS = torch.arange(4, 24)[None]


def lora(**fields: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**settings, **fields})


def dtypes(model: nn.Module, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad is trained}


def held(model: nn.Module) -> int:
    """Return the bytes of the distinct weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 4]}, {"target_modules": ["lm_head", "embed_tokens"]},
        {"use_dora": True}, {"init_lora_weights": "pissa"},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_of_a_bfloat16_base_are_float32(fields: dict[str, Any], tmp_path: Path) -> None:
    """Trained fully or by LoRA matrices, saved, and loaded again with the same values."""
    base = cast_weights(make_model(), BF16)
    base.save_pretrained(tmp_path / "base")
    model: Any = adapters.with_adapter(base, lora(**fields))
    assert dtypes(model, trained=True) == {torch.float32}
    assert dtypes(model, trained=False) == {BF16}
    with torch.no_grad():
        for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(1e-4 * (number + 1))  # lost in bfloat16
    model.save_pretrained(tmp_path / "adapter")
    kept = peft.get_peft_model_state_dict(model)
    if fields.get("init_lora_weights") == "pissa":
        return  # it has another base: see the chain's `base`
    again: Any = adapters.load_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=BF16),
        tmp_path / "adapter",
        trainable=True,
    )
    found = peft.get_peft_model_state_dict(again)
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert dtypes(again, trained=True) == {torch.float32}
    for autocast in (False, True):  # with mixed dtypes for either arithmetic
        with torch.autocast("cpu", BF16, enabled=autocast):
            again(input_ids=IDS, use_cache=False).logits.float().sum().backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_frozen_weights_take_two_bytes_each() -> None:
    """Counted on a model, and on what torch has allocated for it."""
    base = make_model()
    count = sum(p.numel() for p in base.parameters())
    assert held(base) == 4 * count
    model = adapters.with_adapter(cast_weights(base, BF16), lora())
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held(model) == 2 * count + 4 * adapter
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    assert sum(storages.values()) == held(model)  # no view keeps a float32 copy alive


def test_casting_leaves_buffers_alone() -> None:
    """Rotary frequencies in bfloat16 would rotate the positions of long texts."""
    plain, cast = make_model(), cast_weights(make_model(), BF16)
    for (name, a), (_, b) in zip(plain.named_buffers(), cast.named_buffers(), strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b), name
    settings = plain.config.to_diff_dict()
    made = make_random_model({**settings, "dtype": None}, 0, BF16)
    assert {p.dtype for p in made.parameters()} == {BF16}
    assert all(b.dtype == torch.float32 for b in made.buffers())


def test_rounded_weights_have_the_values_of_the_dtype_and_the_size_of_float32() -> None:
    rounded, cast = round_weights(make_model(), BF16), cast_weights(make_model(), BF16)
    for a, b in zip(rounded.parameters(), cast.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_only_frozen_weights_are_cast() -> None:
    model = adapters.with_adapter(make_model(), lora())
    cast_frozen(model, BF16)
    assert dtypes(model, trained=True) == {torch.float32}
    assert dtypes(model, trained=False) == {BF16}


def test_weights_that_transformers_keeps_in_float32_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(model, "_keep_in_fp32_modules", {"q_proj"})
    monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"norm"})
    assert kept_in_float32(model, torch.float32) is None
    strict, weak = kept_in_float32(model, BF16), kept_in_float32(model, torch.float16)
    assert strict is not None and weak is not None
    assert strict.search("model.norm.weight") and not strict.search("model.layers.0.q_proj.weight")
    assert weak.search("model.layers.0.q_proj.weight")
    assert not strict.search("model.norms.weight")
    cast_weights(model, BF16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == BF16


# --- on disk ---


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_a_copy_in_another_dtype(dtype: torch.dtype, shards: str, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "exact", max_shard_size=shards)
    (tmp_path / "exact" / "tokenizer.json").write_text("{}")
    assert copy_in_dtype(tmp_path / "exact", tmp_path / "final", dtype)
    assert stored_dtype(tmp_path / "exact") == torch.float32
    assert stored_dtype(tmp_path / "final") == dtype
    assert {p.name for p in (tmp_path / "final").iterdir()} == {
        p.name for p in (tmp_path / "exact").iterdir()
    }
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert read.dtype == dtype and read.config.dtype == dtype
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight.to(dtype)), name


def test_weights_too_large_for_float16_are_not_saved_as_infinite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "exact")
    assert not copy_in_dtype(tmp_path / "exact", tmp_path / "final", torch.float16)
    assert not (tmp_path / "final").exists()
    assert "model.norm.weight" in caplog.text and "float16" in caplog.text
    assert copy_in_dtype(tmp_path / "exact", tmp_path / "final", BF16)


def test_what_stays_float32_in_memory_stays_so_on_disk(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "exact")
    copy_in_dtype(tmp_path / "exact", tmp_path / "final", BF16, re.compile(r"(^|\.)norm(\.|$)"))
    found = load_file(tmp_path / "final" / "model.safetensors")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {"model.norm.weight"}


def test_names_of_dtypes() -> None:
    assert dtype_name(BF16) == "bfloat16"
