"""The start-up probe: agrees with known families, falls back on others, says so."""

from __future__ import annotations

import logging

import pytest
import torch

from rpo_trainer import attention, step
from rpo_trainer.errors import ModelError
from rpo_trainer.probe import probe
from tests.models import FAMILIES, VOCABULARY, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_share_prompts(family, dtype):
    layout, head = probe(make_model(family, dtype=dtype))
    assert layout == "shared" and head.fused


def test_state_space_model_is_padded_with_a_log_line(caplog):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2
    )
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with caplog.at_level(logging.WARNING):
        layout, _ = probe(model)
    assert layout == "padded"
    assert "step layout: padded, since shared: " in caplog.text


def test_model_that_ignores_the_plan_is_packed_or_padded(monkeypatch, caplog):
    """As a stock attention would: position ids alone, the siblings in plain sight."""

    def blind(module, query, key, value, mask, packing_plan=None, **kwargs):
        return attention.sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping, attention.ATTENTION_NAME, blind
    )
    layout, _ = probe(make_model("llama"))
    assert layout == "padded" and "log-probs differ by" in caplog.text


def test_unknown_logit_scale_falls_back_to_the_models_own_logits(monkeypatch, caplog):
    monkeypatch.delitem(step._SCALES, "granite")
    layout, head = probe(make_model("granite"))
    assert layout == "shared" and not head.fused
    assert "the model's own logits" in caplog.text


def test_nothing_agrees(monkeypatch):
    monkeypatch.setattr("rpo_trainer.probe.token_logprobs", lambda *a: torch.zeros(20))
    with pytest.raises(ModelError, match="no packed step agrees with plain forwards of Llama"):
        probe(make_model("llama"))


def test_mode_and_settings_are_kept():
    model = make_model("llama").train()
    layout, head = probe(model, layout="packed", tile_bytes=4096)
    assert (layout, head.tile_bytes, model.training) == ("packed", 4096, True)
    assert all(parameter.grad is None for parameter in model.parameters())
