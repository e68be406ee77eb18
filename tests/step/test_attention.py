"""The packed attention function compared with explicit attention for each token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rpo_trainer.step import batch
from rpo_trainer.step.attention import ATTENTION_NAME, packed_attention, packing_masks
from rpo_trainer.step.batch import AttentionPlan, Segment

# Prompt of 4 (0-3), response of 3 (4-6), a second response of 5 (7-11); then 3 tokens of another.
PLAN = (Segment(0, 7), Segment(7, 12, 0, 4), Segment(12, 15))
POSITIONS = [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 0, 1, 2]
HEADS, KV_HEADS, T, D = 4, 2, 15, 8


def sees(query: int, key: int) -> bool:
    """Visibility derived from the definition of the plan."""
    if key > query:
        return False
    if query < 7:
        return True
    if query < 12:
        return key < 4 or key >= 7
    return key >= 12


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scaling: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, size: int = D,
) -> Tensor:  # fmt: skip
    """`[1, T, heads, D]`, one query and one head at a time."""
    out = torch.zeros(1, T, HEADS, size, dtype=q.dtype)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        for i in range(T):
            keys = [
                j for j in range(T)
                if sees(i, j) and (window is None or POSITIONS[i] - POSITIONS[j] < window)
            ]  # fmt: skip
            scores = [
                torch.dot(q[0, head, i], k[0, kv, j])
                * (scaling if scaling is not None else 1 / math.sqrt(D))
                for j in keys
            ]
            if softcap is not None:
                scores = [softcap * torch.tanh(s / softcap) for s in scores]
            total = sum(s.exp() for s in scores)
            if sinks is not None:
                total = total + sinks[head].exp()
            for s, j in zip(scores, keys, strict=True):
                out[0, i, head] += s.exp() / total * v[0, kv, j]
    return out


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, n, T, D, generator=generator, dtype=torch.float64)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices are slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 3},
        {"window": 1},
        {"window": 7},
        {"window": 100},
        {"scaling": 0.7},
        {"softcap": 1.5},
        {"softcap": 1.5, "window": 3, "scaling": 0.2},
        {"sinks": SINKS},
        {"sinks": SINKS, "window": 2},
    ],
)
@pytest.mark.parametrize("dense", [0, 3, 11, 12, 256])
def test_plan_is_followed(dense: int, settings: dict[str, Any], tensors, monkeypatch):
    """For every division into kernel calls: by segment, by example, all together."""
    monkeypatch.setattr(batch, "_DENSE_TOKENS", dense)
    names = {"window": "sliding_window", "sinks": "s_aux"}
    out, weights = packed_attention(
        nn.Module(), *tensors, None, packing_plan=AttentionPlan(PLAN),
        **{names.get(name, name): value for name, value in settings.items()},
    )  # fmt: skip
    assert weights is None
    torch.testing.assert_close(out, by_hand(*tensors, **settings), rtol=1e-12, atol=1e-12)


def test_gradients_flow_to_a_shared_prompt_from_every_response(tensors):
    k = tensors[1].clone().requires_grad_()
    out, _ = packed_attention(
        nn.Module(), tensors[0], k, tensors[2], None, packing_plan=AttentionPlan(PLAN)
    )
    (grad,) = torch.autograd.grad(out[0, 7:12].sum(), [k])
    moved = grad[0].abs().sum((0, 2)) > 0
    assert moved.tolist() == [True] * 4 + [False] * 3 + [True] * 5 + [False] * 3


def test_dropout_drops_weights(tensors):
    plan = AttentionPlan(PLAN)
    torch.manual_seed(0)
    for softcap in (None, 5.0):
        runs = [
            packed_attention(
                nn.Module(), *tensors, None, packing_plan=plan, dropout=0.5, softcap=softcap
            )[0]
            for _ in range(200)
        ]
        whole = packed_attention(nn.Module(), *tensors, None, packing_plan=plan, softcap=softcap)[0]
        assert not torch.equal(runs[0], runs[1])
        assert (torch.stack(runs).mean(0) - whole).abs().mean() < 0.15


def test_without_a_plan_it_is_stock_attention(tensors):
    q, k, v = tensors
    module = nn.Module()
    module.is_causal = True
    module.num_key_value_groups = HEADS // KV_HEADS
    out, _ = packed_attention(module, q, k, v, None)
    expected = nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_a_row_of_padding_that_sees_nothing_is_not_nan(tensors):
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    mask[..., 0, :] = False
    out, _ = packed_attention(nn.Module(), *tensors, mask, softcap=2.0)
    assert out.isfinite().all()


def test_masks_are_left_out_within_a_packed_forward_only():
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    config = LlamaConfig(hidden_size=8, num_attention_heads=2)
    config._attn_implementation = ATTENTION_NAME
    padded = torch.tensor([[0, 1, 1]])

    def mask() -> Tensor | None:
        return create_causal_mask(
            config=config, inputs_embeds=torch.zeros(1, 3, 8), attention_mask=padded,
            past_key_values=None, position_ids=None,
        )  # fmt: skip

    with packing_masks():
        assert mask() is None
        with packing_masks():
            pass
        assert mask() is None
    assert mask() is not None
