"""Attention of a packed row with torch's variable-length flash attention: all segments in one kernel call.

Shapes: `T` tokens of the row, `S` segments, `U` keys of all segments, `D` head size.

The queries of a row have the order that the kernel requires: prompt + response 1, response 2, ... So do the
keys, unless a prompt is shared: a further response needs the prompt's keys before its own, so keys and
values are gathered into [prompt + response 1, prompt + response 2, ...]. The kernel aligns queries and keys
at the end of a segment, so that a response attends to its entire prompt and, causally, itself, and a sliding
window is a difference of positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# The kernel supports grouped keys. Since torch 2.12 its wrapper requires an argument for it.
_HAS_GQA_ARGUMENT = "enable_gqa" in inspect.signature(varlen_attn).parameters

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class VarlenIndex:
    """The segments of a row in the form that the kernel requires, computed once for a micro-batch.

    Attributes:
        query_starts: `[S + 1]` int32, start of the queries of each segment, and T.
        longest_query: number of tokens.
        key_starts: `[S + 1]` int32, start of the gathered keys of each segment, and U; None without
            gathering.
        longest_key: number of tokens.
        keys: `[U]`, index in the row of each gathered key; None without gathering.
    """

    query_starts: Tensor
    longest_query: int
    key_starts: Tensor | None
    longest_key: int
    keys: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int, int]]) -> VarlenIndex:
        """Create it from (start, stop, prefix start, prefix stop) of segments that tile the row."""
        queries = [stop - start for start, stop, _, _ in segments]
        lengths = [
            stop - start + prefix_stop - prefix_start
            for start, stop, prefix_start, prefix_stop in segments
        ]
        key_starts = keys = None
        if lengths != queries:
            key_starts = _starts(lengths)
            spans = [span for segment in segments for span in (segment[2:], segment[:2])]
            keys = torch.cat([torch.arange(start, stop) for start, stop in spans])
        return cls(_starts(queries), max(queries), key_starts, max(lengths), keys)

    def map(self, move: Callable[[Tensor], Tensor]) -> VarlenIndex:
        """Return a copy with `move` applied to all tensors."""
        return VarlenIndex(
            move(self.query_starts),
            self.longest_query,
            None if self.key_starts is None else move(self.key_starts),
            self.longest_key,
            None if self.keys is None else move(self.keys),
        )


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def applies(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Whether the kernel supports these tensors, `[1, heads, T, D]`; their values are not read.

    torch exposes no soft-cap, sinks or dropout of the kernel. It requires 16-bit tensors and head sizes up
    to 256 that are multiples of 8; on some consumer GPUs the backward fails for head sizes between 192 and
    256.
    """
    size = query.shape[-1]
    return (
        dropout == 0.0
        and softcap is None
        and sinks is None
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape[-1] == value.shape[-1] == size
        and size % 8 == 0
        and (size <= 192 or size == 256)
        and _has_kernel(query.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernel(device: torch.device) -> bool:
    """Whether torch has the kernel: CUDA builds, GPUs with compute capability 8.0 (A100) or higher."""
    return (
        device.type == "cuda"
        and torch.version.hip is None  # a different kernel
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Compute attention of one layer over a packed row.

    Args:
        query: `[1, heads, T, D]`.
        key: `[1, kv_heads, T, D]`.
        value: `[1, kv_heads, T, D]`.
        index: index of the row, on the same device.
        scaling: factor on the scores; None for 1 / √D.
        sliding_window: number of visible positions including the query's.

    Returns:
        `[1, T, heads, D]`.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    key_starts = index.query_starts
    if index.keys is not None and index.key_starts is not None:
        key_starts = index.key_starts
        k, v = k.index_select(0, index.keys), v.index_select(0, index.keys)
    settings: dict[str, Any] = {"scale": scaling}
    # (back, forward): causal, aligned at the end of a segment; −1 means no limit.
    settings["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    if _HAS_GQA_ARGUMENT and q.shape[1] != k.shape[1]:
        settings["enable_gqa"] = True
    out: Any = varlen_attn(
        q, k, v, index.query_starts, key_starts, index.longest_query, index.longest_key, **settings
    )
    return torch.unsqueeze(out, 0)
