"""4-bit bases: packed, merged, and why merged weights are not quantized again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpo_trainer.errors import RecipeError
from rpo_trainer.models import adapters
from rpo_trainer.models.quantization import dequantized, disable_bnb_cpu_bf16, nf4
from rpo_trainer.step.layout_probe import probe
from tests.models.test_adapters import IDS, logps, lora, stirred
from tests.raising import raises
from tests.small_models import make_model
from tests.step.test_forward import compare, random_examples

peft = pytest.importorskip("peft")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("recipe.missing-library", RecipeError, where="quantization") as error:
        nf4(torch.float32)
    assert "rpo-trainer[qlora]" in str(error.value.fix)


@pytest.fixture
def quantized(tmp_path: Path) -> Any:
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load(compute: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, quantization_config=nf4(compute)
        )
        disable_bnb_cpu_bf16(model)
        return model

    return load


@pytest.mark.extras("bitsandbytes")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_4_bits_pack_and_merge(quantized: Any, compute: torch.dtype) -> None:
    model = adapters.with_adapter(quantized(compute), lora())
    assert adapters.lowest_precision(model) == compute
    with adapters.randomized_zero_init(model):
        assert probe(model)[0] == "shared"
    stirred(model)
    if compute == torch.float32:
        compare(model.eval(), random_examples(3), "shared", rtol=1e-3, atol=1e-4)
    assert torch.equal(logps(model), model(IDS).logits.log_softmax(-1))  # with and without gradient
    whole = dequantized(quantized(compute))
    assert {type(m) for n, m in whole.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}
    state = peft.get_peft_model_state_dict(model)
    again = peft.get_peft_model(whole, lora())
    peft.set_peft_model_state_dict(again, state)
    merged = adapters.merged(again)
    off = (logps(merged) - logps(model)).abs().max()
    assert off < (1e-4 if compute == torch.float32 else 0.1)
    assert dequantized(merged) is merged


@pytest.mark.extras("bitsandbytes")
def test_4_bits_again_take_back_what_was_merged(quantized: Any, tmp_path: Path) -> None:
    """Why merged 4-bit weights are not quantized again: most of them return to their old values."""
    start = dequantized(quantized())
    model = adapters.with_adapter(copy.deepcopy(start), lora(target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.003)
    merged = adapters.merged(model)
    merged.save_pretrained(tmp_path / "merged")
    again = dequantized(
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged",
            dtype=torch.float32,
            quantization_config=nf4(torch.float32),
        )
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    before, learned, after = (m.state_dict()[name] for m in (start, merged, again))
    kept = ((after - before) * (learned - before)).sum() / (learned - before).square().sum()
    noise = (after - learned).norm() / (learned - before).norm()
    assert kept < 0.2 and noise > 0.9
