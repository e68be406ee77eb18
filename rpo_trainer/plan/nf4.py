"""Frozen 4-bit weights in a plan, without bitsandbytes.

bitsandbytes cannot run on fake tensors. The stand-in takes as many bytes and allocates the same temporaries
for each product: the full weight in float32 and in the dtype of the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.models.unwrap import is_classifier, transformers_model


def nf4_bytes(weights: int) -> int:
    """Return the bytes of NF4 weights: 1/2 each, 1 for each 64, 4 for each 64 × 256 (arXiv 2305.14314)."""
    return -(-weights // 2) + -(-weights // 64) + 4 * -(-weights // (64 * 256))


def hold_in_nf4(model: nn.Module, compute: torch.dtype) -> None:
    """Replace frozen linear layers, all but the head, by stand-ins, as transformers would quantize them.

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
        """The dequantized weight, a temporary."""
        return torch.empty(self.shape).to(self.compute)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.to(self.compute), self)  # type: ignore[no-untyped-call]
        return (out if self.bias is None else out + self.bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x · Wᵀ without saving x or W for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Nf4Linear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight, None
