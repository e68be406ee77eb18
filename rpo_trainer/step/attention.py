"""Attention for packed rows, registered with transformers as `rpo_packed`.

A model with this implementation can be used as usual: with an attention plan among the keyword arguments, the
plan is applied; without one (generation, evaluation by other code), attention is that of `sdpa`.

There are three implementations of a plan. On a GPU in 16-bit precision, the entire row is one call of the
variable-length kernel (`attention_varlen.py`). Soft-capped scores and sinks, which that kernel does not
support, use FlexAttention on a GPU (`attention_flex.py`), and explicit scores for each unit elsewhere.
Everything else (other devices, float32, float64, dropout, any head size) uses torch's scaled dot product
attention for each unit.

Shapes: query `[1, heads, T, D]`, key and value `[1, kv_heads, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rpo_trainer.step import attention_flex, attention_varlen
from rpo_trainer.step.attention_reach import current_recording
from rpo_trainer.step.batch import AttentionPlan, Reach

ATTENTION_NAME = "rpo_packed"
REACH_ATTRIBUTE = (
    "_rpo_reach"  # attribute of attention modules, set from `attention_reach.recording`
)


@contextmanager
def packing_masks(plan: AttentionPlan | None = None) -> Iterator[None]:
    """Prevent transformers from building masks for models with `rpo_packed`; the plan replaces them.

    Args:
        plan: passed to the layers as their mask, for models whose layers do not pass other arguments to their
            attention; None passes nothing.
    """
    # transformers builds no mask for implementations without a mask function. With one, it would search the
    # position ids for packed sequences, which synchronizes with the device.
    masks = AttentionMaskInterface._global_mapping
    known = masks.pop(ATTENTION_NAME, None)
    if plan is not None:
        masks[ATTENTION_NAME] = lambda **_: plan
    try:
        yield
    finally:
        masks.pop(ATTENTION_NAME, None)
        if known is not None:
            masks[ATTENTION_NAME] = known


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packing_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one layer, with the signature that transformers calls.

    Args:
        attention_mask: a tensor for regular attention, the plan itself, or None.
        sliding_window: number of visible positions; a reach found by `attention_reach.recording` takes
            precedence.
        softcap: scores become `softcap · tanh(scores / softcap)` (Gemma-2).
        s_aux: `[heads]`, attention sinks.
        packing_plan: attention plan of the packed row; None for regular attention.

    Returns:
        `[1, T, heads, D]`, and None instead of attention weights.
    """
    if (recording := current_recording()) is not None:
        recording.note(module, attention_mask, {**kwargs, "packing_plan": packing_plan})
        packing_plan = None
    elif isinstance(attention_mask, AttentionPlan):
        packing_plan, attention_mask = attention_mask, None
    if packing_plan is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
        mask = attention_mask if attention_mask is not None else _causal(query, key)
        out = _explicit(query, key, value, mask, scaling, dropout, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None

    query, key, value = (in_autocast_dtype(x) for x in (query, key, value))
    reach: Reach = getattr(module, REACH_ATTRIBUTE, None) or Reach(window=sliding_window)
    if attention_varlen.applies(query, key, value, dropout=dropout, softcap=softcap, sinks=s_aux):
        index = packing_plan.index
        if reach.chunk is not None:
            index = packing_plan.chunk_index(reach.chunk, query.device)
        if index is not None:
            out = attention_varlen.attend(
                query, key, value, index, scaling=scaling, sliding_window=reach.window
            )
            return out, None

    written_out = softcap is not None or s_aux is not None
    flex_index = packing_plan.flex_index if written_out and reach.chunk is None else None
    if flex_index is not None and attention_flex.applies(query, key, value, dropout=dropout):
        out = attention_flex.attend(
            query, key, value, flex_index, scaling=scaling, sliding_window=reach.window,
            softcap=softcap, sinks=s_aux,
        )  # fmt: skip
        return out, None

    pieces = []
    units = packing_plan.units
    # Split, not sliced: the gradient of each slice would be a tensor of the size of the entire row.
    sizes = [unit[-1].stop - unit[0].start for unit in units]
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    owner = 0  # the unit with the prompt of the following units
    for number, unit in enumerate(units):
        first = unit[0]
        q, k, v = queries[number], keys[number], values[number]
        if len(unit) == 1 and first.prefix_stop > first.prefix_start:
            start = units[owner][0].start
            prefix = slice(first.prefix_start - start, first.prefix_stop - start)
            k = torch.cat([keys[owner][:, :, prefix], k], dim=2)
            v = torch.cat([values[owner][:, :, prefix], v], dim=2)
        else:
            owner = number
        seen = Reach(*(n if n is not None and n < k.shape[2] else None for n in reach))
        if written_out:
            mask = packing_plan.mask(number, seen, q.device)
            pieces.append(_explicit(q, k, v, mask, scaling, dropout, softcap, s_aux))
            continue
        causal = seen == Reach() and len(unit) == 1 and q.shape[2] == k.shape[2]
        pieces.append(
            F.scaled_dot_product_attention(
                q,
                *_repeat(q, k, v),
                attn_mask=None if causal else packing_plan.mask(number, seen, q.device),
                dropout_p=dropout,
                is_causal=causal,
                scale=scaling,
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Convert to the autocast dtype, as a matrix product would; a norm may return float32."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with explicit scores, for soft-capping and sinks without FlexAttention."""
    key, value = _repeat(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Not −inf: rows of padding may attend to no keys, and must not become NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    at_least_float32 = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        weights = scores.softmax(-1, dtype=at_least_float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=at_least_float32)
    weights = F.dropout(weights.to(value.dtype), p=dropout, training=dropout > 0.0)
    return weights @ value


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat grouped keys and values for each query head."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Return the causal mask, which transformers omits."""
    q, k = query.shape[2], key.shape[2]
    mask = torch.ones(q, k, dtype=torch.bool, device=query.device)
    return mask if q == 1 else mask.tril(k - q)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
