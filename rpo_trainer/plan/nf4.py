"""Frozen weights in 4 bits, for a plan: what they and their products hold, without bitsandbytes.

bitsandbytes cannot run on tensors without content. The stand-in holds as many bytes, and makes for each
product what it makes: the whole weight, in float32 and in the dtype of the product, for a moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.models.unwrap import is_classifier, transformers_model


def nf4_bytes(weights: int) -> int:
    """Half a byte a weight, a byte for 64 of them, four for 64 × 256 (arXiv 2305.14314, section 3)."""
    return -(-weights // 2) + -(-weights // 64) + 4 * -(-weights // (64 * 256))


def hold_in_nf4(model: nn.Module, compute: torch.dtype) -> None:
    """Puts stand-ins in place of the frozen linear layers that transformers would quantize: all but the head.

    Args:
        compute: dtype of the products.
    """
    inner = transformers_model(model)
    head = inner.score if is_classifier(inner) else inner.get_output_embeddings()
    outside = set(head.modules()) if head is not None else set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child not in outside and not child.weight.requires_grad:
                setattr(parent, name, _Nf4Linear(child, compute))


class _Nf4Linear(nn.Module):
    def __init__(self, linear: nn.Linear, compute: torch.dtype) -> None:
        super().__init__()
        self.shape = tuple(linear.weight.shape)
        self.compute = compute
        held = torch.empty(nf4_bytes(linear.weight.numel()), dtype=torch.uint8)
        self.held = nn.Parameter(held, requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight, made for the moment."""
        return torch.empty(self.shape).to(self.compute)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.to(self.compute), self)  # type: ignore[no-untyped-call]
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x · Wᵀ that keeps neither x nor W for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Nf4Linear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight, None
