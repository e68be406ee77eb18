"""A substitute for the variable-length kernel, which requires a GPU: the same results, segment by segment."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rpo_trainer.step import attention_varlen

SIGNATURE = inspect.signature(varlen_attn)


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Masks aligned at the bottom right, as documented for torch's kernel."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1 and attention_varlen._HAS_GQA_ARGUMENT)
    q_starts, k_starts = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (q_starts[-1], k_starts[-1]) == (len(query), len(key)) and len(key) == len(value)
    q_lengths, k_lengths = (torch.diff(starts).tolist() for starts in (cu_seq_q, cu_seq_k))
    assert (max(q_lengths), max(k_lengths)) == (max_q, max_k)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    back, ahead = window_size
    pieces = []
    for q0, k0, n, m in zip(q_starts, k_starts, q_lengths, k_lengths):  # noqa: B905
        q, k, v = query[q0 : q0 + n], key[k0 : k0 + m], value[k0 : k0 + m]
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = torch.ones(n, m, dtype=torch.bool)
        if ahead >= 0:
            seen &= distance >= -ahead
        if back >= 0:
            seen &= distance <= back
        scores = torch.einsum("qhd,khd->hqk", q, k) * (
            q.shape[-1] ** -0.5 if scale is None else scale
        )
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(pieces)


def emulate(monkeypatch: pytest.MonkeyPatch, kernel: Any = reference) -> list[dict[str, Any]]:
    """Puts the stand-in where the kernel would be called on a GPU, in any dtype.

    Returns:
        The arguments of each call so far, every one of which the real kernel would take.
    """
    calls: list[dict[str, Any]] = []

    def called(*args: Any, **settings: Any) -> Tensor:
        known = {
            k: v for k, v in settings.items() if k != "enable_gqa" or k in SIGNATURE.parameters
        }
        calls.append(SIGNATURE.bind(*args, **known).arguments | settings)
        return kernel(*args, **settings)

    monkeypatch.setattr(attention_varlen, "varlen_attn", called)
    monkeypatch.setattr(attention_varlen, "_has_kernel", lambda device: True)
    monkeypatch.setattr(attention_varlen, "_DTYPES", (torch.float64, torch.float32, torch.bfloat16))
    return calls
