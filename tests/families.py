"""A small random model of every family of transformers, from the defaults of its config class.

`tiny_model("llama4")` is a model of four layers with random biases, norms and scales. Sizes are set by the
names of the config's fields, so that a new family of transformers usually needs no entry here.

The reach of attention, chunks and indexers is an argument: by default a few tokens, so that it limits rows of
ten tokens; with `wide=True` tens of tokens, so that it does not. Real models are of the second kind: their
windows are longer than any text of a probe.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS = 128, 4
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Field names (patterns) and their values. The first match counts; fields that are None stay None.
_SIZES: tuple[tuple[str, Any], ...] = (
    # tables
    ("type_vocab_size task_type_vocab_size depthwise_multiplier", None),  # None: unchanged
    ("ngram_vocab_size_base encoder_hash_byte_group_vocab", 64),
    ("*vocab_size vocab_size_per_layer_input", VOCABULARY),
    ("make_ngram_vocab_size_divisible_by", 8),
    ("original_max_position_embeddings", 256),
    ("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length", 512),
    ("max_source_positions max_target_positions", 512),
    # experts, low ranks, indexers; before the widths, whose patterns are more general
    ("moe_*intermediate_size shared_*intermediate_size expert_ffn_hidden_size", 24),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    ("num_experts_per_tok* moe_topk moe_k zero_expert_num", 2),
    ("n_group topk_group num_expert_group n_shared_experts *num_shared_experts", 1),
    ("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    ("moe_layer_end_index", LAYERS - 1),
    ("q_lora_rank kv_lora_rank index_head_dim qk_head_dim o_lora_rank attention_head_dim", 16),
    ("router_hidden_size ple_embed_dim", 16),
    ("qk_*_head_dim v_head_dim d_rel laurel_rank hc_lowrank hidden_size_per_layer_input", 8),
    ("adapter_rank gated_norm_rank rotary_dim mamba_dt_rank time_step_rank", 4),
    ("index_n_heads o_groups split_ngram_parts heads_per_ngram num_codebooks", 2),
    # state spaces and linear attention
    ("*state_size mamba_d_state linear_*head_dim", 8),
    ("mamba_d_head mamba_head*dim", 16),
    ("mamba_d_ssm", 64),
    ("mamba_n_heads mamba_num_heads linear_num_heads linear_num_value_heads", 4),
    ("n_mamba_heads linear_num_key_heads attn_layer_period expert_layer_period", 2),
    ("mamba_*groups n_groups attn_layer_offset expert_layer_offset num_random_blocks", 1),
    # towers, which read no text
    ("image_size", 28),
    ("depths", [1, 1]),
    ("num_mel_bins num_position_embeddings", 16),
    ("num_global_layers spatial_merge_size", 1),
    ("encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth", 2),
    # widths, heads, layers
    ("intermediate_size* dense_intermediate_size *ffn_dim n_inner dff dim_ff d_inner", 48),
    ("ffn_hidden_size feed_forward_size", 48),
    ("*hidden_size hidden_size_* d_model n_embd emb_dim *embed_dim embedding_dim", 32),
    ("*embedding_size word_embed_proj_dim lru_width prompt_mid_dim projection_dim", 32),
    ("base_channels hidden_dim", 32),
    ("*head_dim d_head dim_head attention_head_size kv_channels", 8),
    ("*num_key_value_heads num_global_key_value_heads num_kv_heads", 2),
    ("*attention_heads n_head n_heads num_heads num_query_groups", 4),
    ("num_hidden_layers n_layer n_layers num_layers num_blocks", LAYERS),
    ("global_attn_every_n_layers layer_group_size *sliding_window_pattern", 2),
    ("no_rope_layer_interval interleave_moe_layer_step n_layers_per_attn_res_block", 2),
    ("num_layers_per_stack", 2),
    ("num_kv_shared_layers num_nextn_predict_layers", 0),
    # scales: not one, because a missing factor of one would not be detected
    ("logits_scaling", 4.0),
    ("embedding_multiplier *logit_softcapping *logit*_soft_cap", 3.0),
    ("residual_multiplier ssm_out_multiplier", 0.6),
    ("attention_multiplier lm_head_multiplier", 0.3),
    ("*_multiplier", 0.8),
    # tokens
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id decoder_start_token_id", 2),
    ("sep_token_id eod_token_id", 3),
    ("cls_token_id", 4),
    ("mask_token_id", 5),
)  # fmt: skip
# Fields that limit how far a token attends: their value, and the one with `wide`.
_REACHES: tuple[tuple[str, int, int], ...] = (
    ("sliding_window* window_size attention_window_size keep_window_size", 6, 40),
    ("attention_chunk_size rel_extent log_scaling_n_floor floor_scale", 8, 40),
    ("chunk_size mamba_chunk_size block_size *_attn_chunk_length", 8, 32),
    ("index_topk", 4, 40),
    ("index_topk_blocks", 2, 5),
    ("index_block_size", 4, 8),
    ("local_attention", 12, 80),
    ("local_attention_window_len", 12, 40),
    ("mem_len", 8, 512),
)
# Lists with an entry for each layer: the default's kinds alternate.
_PER_LAYER = "layer_types mlp_layer_types layers_block_type block_types indexer_types"
_NEVER_NONE = "pad_token_id bos_token_id eos_token_id"
_NOT_FROM_ZERO = "n_shared_experts num_shared_experts shared_intermediate_size"

WINDOW = "<window>"  # in the settings below: the size of a window
ABSENT = "<absent>"  # ... : the field is left out
_LAYERS_IN_TURN = ["full_attention", "sliding_attention"] * 2
_QWEN_WINDOW = {
    "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
    "layer_types": _LAYERS_IN_TURN,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_WIDE_HEADS = {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}}

# Settings that families need in addition to their reduced defaults: several families, then single ones.
_SETTINGS_OF_MANY: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer "
        "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
        {"is_decoder": True},
    ),
    ("mistral mixtral phi3 phimoe starcoder2", {"sliding_window": WINDOW}),
    ("qwen2 qwen2_moe qwen3 qwen3_moe", _QWEN_WINDOW),
    ("qwen4_exp qwen4_exp_text", _INDEXER),
    ("gemma4_text gemma4_unified_text", {**_WIDE_HEADS, "num_kv_shared_layers": 2}),
    ("hunyuan_v1_dense hunyuan_v1_moe ministral", {"head_dim": 8}),
)
_SETTINGS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config": {"num_hidden_layers": 1, "num_key_value_heads": 4}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": _LAYERS_IN_TURN,
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "layer_types": _LAYERS_IN_TURN,
    },
    "dots3_note_text": {
        "per_layer_config": {i: {"kv_lora_rank": 8, "qk_nope_head_dim": 8} for i in (1, 3)},
        "head_dim": 16, "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    },
    "dots3_note": {
        "vision_config": {
            "adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_merge_size": 1,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "falcon_h1": {"mlp_multipliers": [0.8, 1.2], "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7]},
    "gemma3n_text": {
        "intermediate_size": [48] * LAYERS, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ABSENT},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": ABSENT,
        "block_multiple_of": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64},
    "zamba2": {"attention_hidden_size": 64, "mamba_headdim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
# Families that the sweep excludes, and why.
NOT_SWEPT = {
    "gemma3n": "its vision tower needs timm, its language model is `gemma3n_text`",
    "gemma4_assistant": "drafts for another model and reads that model's states",
    "gemma4_unified_assistant": "drafts for another model and reads that model's states",
    "musicgen": "transformers cannot build its decoder, which predicts audio codes, from this config",
    "musicgen_melody": (
        "transformers cannot build its decoder, which predicts audio codes, from this config"
    ),
    "reformer": "has gradients in train mode only, where its hashing is random",
}

# Settings of a family that change what the step must do: name → family, settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3+mtp": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "falcon+alibi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon+new_architecture": ("falcon", {"new_decoder_architecture": True}),
    "gemma3_text+softcap": (
        "gemma3_text", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "gpt_neox+dropout": ("gpt_neox", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
    "gpt_oss+aux_loss": ("gpt_oss", _ROUTED),
    "granitemoehybrid+dense": (
        "granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "llama+attention_dropout": ("llama", {"attention_dropout": 0.3}),
    "llama+tied": ("llama", {"tie_word_embeddings": True}),
    "mamba+tied": ("mamba", {"tie_word_embeddings": True}),
    "mixtral+aux_loss": ("mixtral", _ROUTED),
    "mixtral+jitter": ("mixtral", {"router_jitter_noise": 0.1}),
    "opt+layerdrop": ("opt", {"layerdrop": 0.5}),
    "phimoe+jitter": ("phimoe", {"input_jitter_noise": 0.1, "router_jitter_noise": 0.1}),
    "qwen3_moe+aux_loss": ("qwen3_moe", _ROUTED),
    "stablelm+parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}  # fmt: skip


def tiny_config(name: str, wide: bool = False) -> Any:
    """The config of a small model.

    Args:
        name: a family (`model_type`) or one of VARIANTS.
        wide: windows and chunks of tens of tokens instead of a few.
    """
    family, extra = VARIANTS.get(name, (name, {}))
    made = CONFIG_MAPPING[family]
    fields = _over(_shrunk(made().to_dict(), wide), _settings(family), wide)
    inner = _settings(f"{family}_text")  # a model with towers has the settings of its text model
    if inner and isinstance(fields.get("text_config"), dict):
        fields["text_config"] = _over(fields["text_config"], inner, wide)
    return made(**_over(fields, extra, wide))


def tiny_model(
    name: str, wide: bool = False, *, factory: Any = AutoModelForCausalLM, seed: int = 0
) -> Any:
    """A small random model in float32 and eval mode.

    Args:
        name, wide: see `tiny_config`.
        factory: an auto class of transformers.
    """
    torch.manual_seed(seed)
    return stirred(factory.from_config(tiny_config(name, wide), dtype=torch.float32)).eval()


def stirred(model: nn.Module) -> Any:
    """Return the model with noise on all parameters: biases of zero and norms of one would hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _settings(family: str) -> dict[str, Any]:
    found = [settings for names, settings in _SETTINGS_OF_MANY if family in names.split()]
    return {k: v for settings in (*found, _SETTINGS.get(family, {})) for k, v in settings.items()}


def _shrunk(fields: Mapping[str, Any], wide: bool) -> dict[str, Any]:
    """Return the fields whose small value differs from the default."""
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {**_shrunk(value, wide), "model_type": value["model_type"]}
        elif _fits(name, _PER_LAYER) and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif (reach := _reach(name, wide)) is not None:
            small |= {name: reach} if value and not isinstance(value, list) else {}
        elif (size := _size(name)) is not None and _sized(name, value):
            small[name] = size
    heads = fields.get("num_attention_heads")
    if small.get("num_key_value_heads") and heads == fields["num_key_value_heads"]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _sized(name: str, value: Any) -> bool:
    """Whether a field's value is to be replaced."""
    if value is None:
        return _fits(name, _NEVER_NONE)
    if isinstance(value, list) and name not in ("eos_token_id", "depths"):
        return False
    return not (value == 0 and _fits(name, _NOT_FROM_ZERO))


@functools.cache
def _size(name: str) -> Any:
    return next((size for patterns, size in _SIZES if _fits(name, patterns)), None)


@functools.cache
def _reach(name: str, wide: bool) -> int | None:
    found = (r for r in _REACHES if _fits(name, r[0]) and "pattern" not in name)
    return next((far if wide else near for _, near, far in found), None)


def _fits(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def _over(fields: dict[str, Any], settings: Mapping[str, Any], wide: bool) -> dict[str, Any]:
    """Return the fields updated with the settings."""
    out = dict(fields)
    for name, value in settings.items():
        if value == ABSENT:
            out.pop(name, None)
        elif value == WINDOW:
            out[name] = _reach("sliding_window", wide)
        elif isinstance(value, dict) and isinstance(out.get(name), dict):
            out[name] = _over(out[name], value, wide)
        else:
            out[name] = value
    return out
