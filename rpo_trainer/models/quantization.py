"""Frozen weights in 4 bits (QLoRA): how they are held, kept to one arithmetic, and turned back."""

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
    """How a frozen base is held in 4 bits (QLoRA, arXiv 2305.14314): NF4, its constants quantised too.

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
            why="transformers keeps weights in 4 bits by its kernels, and has none of its own",
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
    """Keeps bitsandbytes from another arithmetic in eval mode.

    On a CPU with bfloat16 instructions its 4-bit layers turn, at the first forward without gradient, into a
    bfloat16 form that is less exact and has no backward: the reference would not be the policy's.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A 4-bit model as the float32 model that it stands for; any other one as it is."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    whole: Any = model.dequantize(torch.float32)  # type: ignore[no-untyped-call]
    return whole  # type: ignore[no-any-return]
