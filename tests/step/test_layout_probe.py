"""The probe selects the fastest layout that passes, and reports why faster ones fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from rpo_trainer.errors import ModelError
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.step import attention, attention_varlen, layout_proof
from rpo_trainer.step import head as heads
from rpo_trainer.step import layout_probe as probe_module
from rpo_trainer.step.attention_reach import rotary_limit
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.head import Head
from rpo_trainer.step.layout_probe import probe
from rpo_trainer.step.packing import pack
from tests.families import tiny_model
from tests.raising import raises
from tests.small_models import FAMILIES, VOCABULARY, make_model
from tests.varlen_kernel import emulate, reference

# State-space layers, linear attention, convolutions, ALiBi: texts of a row affect the next one.
PADDED = probe_module._NAMES["padded"]
LEAKING = (
    "bamba", "bloom", "falcon", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear",
    "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "qwen3_5_text",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_share_prompts(family, dtype):
    layout, head = probe(make_model(family, dtype=dtype))
    assert layout == "shared" and head.fused


@pytest.mark.parametrize("leaks", [False, True])
def test_kernels_that_only_autocast_takes_are_proved_too(leaks, monkeypatch, caplog):
    """As on a GPU: float32 uses units, and would not show the error."""

    def kernel(*args: Any, **settings: Any) -> Tensor:
        out = reference(*args, **settings)
        return out + 1e-3 * out.mean(0) if leaks else out

    calls = emulate(monkeypatch, kernel)
    monkeypatch.setattr(attention_varlen, "_DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(probe_module, "_has_own_kernels", lambda device: True)
    assert probe(make_model("llama"))[0] == "shared" and not calls
    layout, head = probe(make_model("llama"), autocast=torch.bfloat16)
    assert layout == ("padded" if leaks else "shared") and head.fused and calls
    assert ("bfloat16" in caplog.text) == leaks


@pytest.mark.parametrize("set_for", ["all", "products", "nothing"])
def test_tf32_is_off_during_the_probe_and_restored_after(set_for, monkeypatch):
    """torch_compile enables TF32, with three correct digits, for which the layouts would be refused."""
    every, products = torch.backends, torch.backends.cuda.matmul
    before = every.fp32_precision, products.fp32_precision
    seen = []
    monkeypatch.setattr(
        probe_module, "plain_answers",
        lambda *args: seen.append(products.fp32_precision) or layout_proof.plain_answers(*args),
    )  # fmt: skip
    try:
        if set_for != "nothing":
            (every if set_for == "all" else products).fp32_precision = "tf32"
        found = every.fp32_precision, products.fp32_precision
        probe(make_model("llama"))
        assert set(seen) == {"ieee"}
        assert (every.fp32_precision, products.fp32_precision) == found
        if set_for == "all":
            every.fp32_precision = "ieee"
            assert products.fp32_precision == "ieee"  # it still inherits the global setting
    finally:
        products.fp32_precision, every.fp32_precision = "none", before[0]
    assert (every.fp32_precision, products.fp32_precision) == before


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["random", "fresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LEAKING)
def test_no_layout_that_leaks_is_taken(family, dtype, weights):
    """Nor with the small weights of a new model, for which a leak is smaller than bfloat16 rounding."""
    model = tiny_model(family)
    if weights == "fresh":
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    if (family, dtype) == ("xlstm", torch.bfloat16):  # its own forward fails too
        with raises("model.forward-fails", ModelError) as error:
            probe(model.to(dtype))
        assert "xLSTMForCausalLM" in error.value.what
    else:
        assert probe(model.to(dtype))[0] in ("padded", "single")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_rounding_of_experts_is_not_a_leak(family):
    """Other texts change the batch size of an expert, and with it the last bit."""
    layout, head = probe(tiny_model(family))
    assert layout == "shared" and head.fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "leaks"),
    [
        ("mixtral", False),
        ("qwen3_moe", False),
        ("jamba", True),
        ("lfm2_moe", True),
        ("qwen3_next", True),
    ],
)
def test_without_gradients_the_order_of_other_texts_is_tested(family, leaks, dtype, monkeypatch):
    """As under ZeRO-3: the routing is the same, so that rounding is equal for experts, but not for states."""
    model = tiny_model(family).to(dtype)
    monkeypatch.setattr("rpo_trainer.step.layout_probe.sees_others", lambda *_, **__: None)
    assert probe(model)[0] == ("padded" if leaks else "shared")
    examples, others = (
        layout_proof.random_examples(model),
        layout_proof.random_examples(model, seed=1),
    )
    install(model, layout="packed")
    assert layout_proof.sees_order(model, examples, others, "packed", pad_token_id=0) is leaks


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("nemotron", {}),  # its layers do not pass the plan to their attention
        ("stablelm", {}),
        ("minicpm3", {"hidden_multiplier": 8.0}),
        ("cohere2_moe", {"logit_scale": 0.0625}),
        ("granite_swa", {"logit_scale": 0.25}),
        ("gemma4_text", {}),  # passes a slice of its mask to its layers
    ],
)
def test_families_that_used_to_fall_back_share_prompts_with_a_fused_head(family, settings):
    layout, head = probe(tiny_model(family))
    assert layout == "shared" and head.fused
    assert head == Head(**settings)


@pytest.mark.parametrize("family", ["deepseek_v32", "doge"])
def test_attention_that_selects_tokens_gets_one_response_a_forward(family, caplog):
    """The effect of padding on the selection does not show with a few tokens."""
    with caplog.at_level(logging.WARNING):
        layout, _ = probe(tiny_model(family))
    assert layout == "single"
    assert caplog.text.count(f"{PADDED}: ") == 1


def test_one_response_a_forward_is_what_plain_forwards_give():
    model = tiny_model("deepseek_v32", wide=True)
    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "prompt_ids": torch.randint(6, 100, (prompt,), generator=generator).tolist(),
            "response_ids": [
                torch.randint(6, 100, (n,), generator=generator).tolist() for n in lengths
            ],
            "response_mask": [[1] * n for n in lengths],
        }
        for prompt, lengths in ((40, (30, 7)), (5, (61,)))
    ]
    expected = layout_proof.plain_answers(model, examples).values
    install(model, layout="single")
    actual = token_logprobs(model, pack(examples, "single").model_inputs)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5)


def test_state_space_model_is_padded_with_a_log_line(caplog):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2
    )
    with caplog.at_level(logging.WARNING):
        layout, _ = probe(MambaForCausalLM(config))
    assert layout == "padded"
    (record,) = [r for r in caplog.records if r.name == probe_module.__name__]
    said, _, refused = record.getMessage().partition("(")
    assert record.levelname == "WARNING" and PADDED in said
    assert refused.startswith(f"{probe_module._NAMES['shared']}: ")


class Blind(nn.Module):
    """An attention function that ignores the plan, so that other responses are visible."""

    def forward(self, module, query, key, value, mask, packing_plan=None, **kwargs):
        stock = attention.packed_attention
        if attention.current_recording() is not None:
            return stock(module, query, key, value, mask, packing_plan=packing_plan, **kwargs)
        return attention.sdpa_attention_forward(module, query, key, value, None, **kwargs)


def test_attention_that_ignores_the_plan_is_padded(monkeypatch, caplog):
    functions = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(functions, attention.ATTENTION_NAME, Blind())
    layout, _ = probe(make_model("llama"))
    assert layout == "padded" and probe_module._DEPENDS in caplog.text


@pytest.mark.parametrize("size", [1e-7, 1e-3])
def test_the_smallest_leak_is_seen(size):
    """A layer that adds a small multiple of the row's mean, below any rounding tolerance."""
    model = make_model("llama")

    def leak(module, args, output):
        return output + size * output.mean(1, keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(leak)
    layout, _ = probe(model)
    assert layout == "single"  # padding is part of the mean


def test_a_head_that_is_learned_wrongly_is_refuted(monkeypatch, caplog):
    monkeypatch.setattr("rpo_trainer.step.forward.head_of", lambda *_: heads.Head(logit_scale=1.01))
    layout, head = probe(make_model("granite"))
    assert layout == "shared" and not head.fused
    assert probe_module._OWN_LOGITS in caplog.text


def test_nothing_agrees(monkeypatch):
    monkeypatch.setattr("rpo_trainer.step.layout_proof.token_logprobs", lambda *a: torch.zeros(12))
    with raises("model.no-exact-layout", ModelError) as error:
        probe(make_model("llama"))
    assert "LlamaForCausalLM" in error.value.what


def test_mode_and_settings_are_kept():
    model = make_model("llama").train()
    layout, head = probe(model, layout="packed", logits_chunk_bytes=4096)
    assert (layout, head.logits_chunk_bytes, model.training) == ("packed", 4096, True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in transformers_model(model).modules())


def test_texts_of_the_proof_hold_no_token_with_a_meaning():
    model = make_model("llama")
    model.config.image_token_id = 7
    for seed in range(20):
        for example in layout_proof.random_examples(model, seed):
            tokens = {*example["prompt_ids"]}.union(*example["response_ids"])
            assert not tokens & {0, 1, 2, 7}


# --- rotary embeddings that change with the longest text ---


def _long_rope(kind: str) -> nn.Module:
    common = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    rope: dict = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        config = Phi3Config(
            **common, max_position_embeddings=64, original_max_position_embeddings=16,
            rope_parameters=rope,
        )  # fmt: skip
        return Phi3ForCausalLM(config).eval()
    config = LlamaConfig(**common, max_position_embeddings=16, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_embedding_that_changes_with_the_longest_text(kind):
    """With a text beyond the limit, a short one has other angles, in the same row or batch."""
    model = _long_rope(kind)
    limit = rotary_limit(model)
    assert limit is not None and (limit.kind, limit.positions) == (kind, 16)
    assert probe(model, longest=16)[0] == "shared"
    if kind == "longrope":
        assert probe(model, longest=17)[0] == probe(model)[0] == "single"
    else:  # and later texts too
        with raises("model.no-exact-layout", ModelError):
            probe(model, longest=17)
    assert rotary_limit(make_model("llama")) is None


def test_single_rows_of_longrope_are_right_at_any_length():
    model = _long_rope("longrope")
    examples = [
        {"prompt_ids": [5] * n, "response_ids": [[7, 8, 9], [9] * k], "response_mask": [[1] * 3, [1] * k]}
        for n, k in ((4, 5), (6, 40))
    ]  # fmt: skip
    expected = layout_proof.plain_answers(model, examples).values
    off = {}
    for layout in ("shared", "padded", "single"):
        install(model, layout=layout)
        found = token_logprobs(model, pack(examples, layout).model_inputs)
        off[layout] = (found - expected).abs().max().item()
    assert off["single"] < 1e-5 < 5e-5 < min(off["shared"], off["padded"])


# --- odd models and settings ---


def test_an_inexact_requested_layout_is_refused():
    with raises("training.inexact-layout", ModelError) as error:
        probe(tiny_model("mamba"), layout="shared")
    assert "layout='shared'" in error.value.what


@pytest.mark.parametrize("vocabulary", [3, 4, 5, 7, 12])
def test_vocabularies_of_a_few_tokens(vocabulary):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert probe(LlamaForCausalLM(config))[0] == "shared"


def test_the_head_of_a_model_that_rounds_in_front_of_it_is_fused():
    layout, head = probe(tiny_model("mamba").to(torch.bfloat16))
    assert layout == "padded" and head.fused


@pytest.mark.slow
@pytest.mark.parametrize("family", ["jamba", "lfm2", "qwen3_next", "mixtral"])
def test_shards_with_halves_take_no_leaking_layout(family, tmp_path):
    """FSDP2 computes in bfloat16: the difference shows in the last bit, or in the gradient."""
    script = tmp_path / "sharded.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard\n"
        "from rpo_trainer.step.layout_probe import probe\n"
        "from tests.families import tiny_model\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=0, world_size=1)\n"
        "model = tiny_model(sys.argv[1])\n"
        "policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)\n"
        "fully_shard(model, mesh=init_device_mesh('cpu', (1,)), mp_policy=policy)\n"
        "print('layout', probe(model)[0])\n"
        "dist.destroy_process_group()\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script), family, str(tmp_path / "meeting")],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    wanted = "shared" if family == "mixtral" else "padded"
    assert f"layout {wanted}" in ran.stdout, ran.stdout + ran.stderr


def test_a_default_device_of_the_callers_does_not_matter():
    model = make_model()
    expected = layout_proof.random_examples(model)
    with torch.device("meta"):
        assert layout_proof.random_examples(model) == expected
