"""Small random models of many families, created for the tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48},
}  # fmt: skip

_MIXTURE = {"num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict] = {
    "mixtral": {**_MIXTURE, "num_local_experts": 4},
    "qwen3_moe": {**_MIXTURE, "num_experts": 4},
    "gpt_oss": {**_MIXTURE, "num_local_experts": 4, "sliding_window": 6},
}


def make_model(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **extra
):
    """A random model of two layers with dropout off; biases and norms are random too."""
    settings = {**({} if family == "gpt2" else _COMMON), **(FAMILIES | MIXTURES)[family], **extra}
    if family == "gpt2":
        settings = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **settings}
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **settings)
    # transformers 5.17 gives Gemma-2 an sdpa that drops the soft-cap of its scores.
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    if family in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
