"""Tokens and floating-point operations of training forwards, for transformers' counters."""

from __future__ import annotations

from typing import Any

from torch import nn


def forward_tokens_of(inputs: dict[str, Any], *, padding: bool) -> int:
    """Tokens of a collated micro-batch, or of all those of a step; on the host, nothing waits for a device.

    Args:
        padding: whether padding counts, and the filler of a process that has no example left.
    """
    if "micro_batches" in inputs:
        return sum(forward_tokens_of(batch, padding=padding) for batch in inputs["micro_batches"])
    model_inputs = inputs["model_inputs"]
    if padding:
        return int(model_inputs["input_ids"].numel())
    if not bool(inputs["weights"].any()):
        return 0
    mask = model_inputs["attention_mask"]
    return int(model_inputs["input_ids"].numel() if mask is None else mask.sum())


def flops_per_token(model: nn.Module) -> int:
    """6 operations a weight for forward and backward, without the embeddings, as transformers estimates."""
    count: Any = getattr(model, "num_parameters", None)
    return 0 if count is None else 6 * int(count(exclude_embeddings=True))
