"""Frozen weights in 4 bits (QLoRA): configuration, consistent arithmetic, dequantization."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rpo_trainer.errors import RecipeError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration of a frozen 4-bit base (QLoRA, arXiv 2305.14314): NF4, double quantization.

    Args:
        compute: dtype of the products.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "`quantization: nf4` needs bitsandbytes, which is not installed",
            code="recipe.missing-library",
            where="quantization",
            why="transformers uses its 4-bit kernels",
            fix="pip install 'rpo-trainer[qlora]'",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def disable_bnb_cpu_bf16(model: nn.Module) -> None:
    """Disable a bitsandbytes conversion that changes the arithmetic in eval mode.

    On a CPU with bfloat16 instructions, 4-bit layers convert at the first forward without gradients to a
    bfloat16 form that is less exact and has no backward, so reference and policy would differ.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Dequantize a 4-bit model to float32; other models are returned unchanged."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    full: Any = model.dequantize(torch.float32)  # type: ignore[no-untyped-call]
    return full  # type: ignore[no-any-return]
