"""The reach of attention is determined from the model's own masks, for any length."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from rpo_trainer.step.attention import REACH_ATTRIBUTE
from rpo_trainer.step.attention_reach import reach_of
from rpo_trainer.step.batch import Reach
from rpo_trainer.step.forward import install, uninstall
from tests.small_models import make_model

NO_PADDING = torch.zeros(1, dtype=torch.long)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("size", [1, 2, 6, 4096, 1_000_000])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (sliding_window_causal_mask_function, "window"),
        (lambda size: chunked_causal_mask_function(size, NO_PADDING), "chunk"),
    ],
)
def test_windows_and_chunks_are_distinguished_at_any_size(make, name, size):
    # A window of one equals a chunk of one.
    wanted = Reach(window=1) if size == 1 else Reach(**{name: size})
    assert reach_of(make(size), size) == wanted
    assert reach_of(make(size), size + 1) is None


@pytest.mark.parametrize(
    "mask_function",
    [
        bidirectional_mask_function,
        or_masks(causal_mask_function, lambda b, h, q, kv: kv < 3),
        and_masks(causal_mask_function, lambda b, h, q, kv: q - kv != 4097),
        lambda b, h, q, kv: torch.tensor([1, 1, 0])[q] == kv,  # depends on the tokens
    ],
)
def test_another_mask_is_none_of_them(mask_function):
    assert reach_of(mask_function) is None
    assert reach_of(mask_function, 64) is None
    assert reach_of(causal_mask_function) == Reach()


def test_what_a_mask_function_holds_on_another_device_is_read_on_the_cpu(monkeypatch):
    """On a GPU an index out of range terminates the process, and devices cannot be mixed."""
    moved = []
    elsewhere = torch.zeros(1, dtype=torch.long).as_subclass(_Elsewhere)
    monkeypatch.setattr(_Elsewhere, "cpu", lambda self: moved.append(self) or NO_PADDING)
    assert reach_of(chunked_causal_mask_function(6, elsewhere), 6) == Reach(chunk=6)
    assert moved


class _Elsewhere(torch.Tensor):
    device = torch.device("cuda")


@needs_gpu
def test_mask_functions_that_hold_tensors_of_a_gpu():
    assert reach_of(chunked_causal_mask_function(6, NO_PADDING.cuda()), 6) == Reach(chunk=6)
    few = torch.tensor([1, 1, 0]).cuda()
    assert reach_of(lambda b, h, q, kv: few[q] == kv) is None
    assert few.sum() == 2  # the device still works


def _model(family: str, **settings):
    common = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **common, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def reaches(model) -> list[Reach | None]:
    return [
        getattr(module, REACH_ATTRIBUTE)
        for module in model.modules()
        if REACH_ATTRIBUTE in vars(module)
    ]


SLIDING = ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (lambda: make_model("llama"), [Reach()] * 2),
        (lambda: make_model("mistral"), [Reach(window=6)] * 2),
        (
            lambda: _model("qwen3", use_sliding_window=True, sliding_window=5, layer_types=SLIDING),
            [Reach(), Reach(window=5)] * 2,
        ),
        # The window is in the mask alone: its attention function is called without one.
        (
            lambda: _model(
                "qwen2_moe", use_sliding_window=True, sliding_window=5, layer_types=SLIDING,
                num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                shared_expert_intermediate_size=24,
            ),
            [Reach(), Reach(window=5)] * 2,
        ),
        (
            lambda: _model(
                "llama4_text", attention_chunk_size=7, num_local_experts=2, no_rope_layers=[1, 1, 1, 0],
                intermediate_size_mlp=48, attn_temperature_tuning=False,
            ),
            [Reach(chunk=7)] * 3 + [Reach()],
        ),
    ],
    ids=["full", "window", "both", "mask-alone", "chunks"],
)  # fmt: skip
def test_each_layer_has_the_reach_of_its_mask(model, wanted):
    model = model()
    recorded = install(model)
    assert recorded.problems == [] and reaches(model) == wanted
    uninstall(model)
    assert reaches(model) == []


def test_positions_counted_by_the_layers_themselves_are_a_problem():
    model = _model(
        "llama4_text", num_local_experts=2, no_rope_layers=[1, 1, 1, 0], intermediate_size_mlp=48,
        attn_temperature_tuning=True,
    )  # fmt: skip
    recorded = install(model)
    assert [p for p in recorded.problems if "counts positions" in p] and not recorded.selecting


def test_a_mask_of_the_layers_own_is_a_problem_of_padded_rows_too():
    model = _model("doge")
    recorded = install(model)
    assert recorded.selecting and set(recorded.selecting) <= set(recorded.problems)
