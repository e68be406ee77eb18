"""Determine the operations between a model's last hidden states and its logits.

The fused head computes the product of hidden states and weight itself, so it needs the other operations of
the model: logits = cap · tanh(scale · ((multiplier · h) Wᵀ + b) / cap). In a forward of a few tokens the
hidden states and the head's product are replaced by known float32 numbers. The model's output then yields
the three numbers, in float32 precision for models of any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.models.multimodal import text_decoder
from rpo_trainer.models.sharding import device_of, num_rows
from rpo_trainer.step.logprobs import DEFAULT_LOGITS_CHUNK_BYTES

# Replacements of the head's product, one for each token: small values yield the scale, large ones the cap.
_PRODUCTS = (1e-3, -1e-3, 0.1, -0.1, 1.0, -1.0, 7.0, -7.0, 33.0, -33.0, 500.0, -500.0, 1e6, -1e6)
_PRECISION = 1e-5
# Exceptions of a forward that a model does not support.
FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass
class Head:
    """Operations between the last hidden state and the logits.

    Attributes:
        hidden_multiplier: factor on the hidden states before the head (MiniCPM3).
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma-2).
        fused: False if the operations are unknown; then the logits of the model's own forward are used.
        logits_chunk_bytes: maximum size of a tile of logits.
    """

    hidden_multiplier: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    fused: bool = True
    logits_chunk_bytes: int = DEFAULT_LOGITS_CHUNK_BYTES


def head_of(model: Any, forward: Callable[..., Any]) -> Head:
    """Determine the head of a transformers causal language model by running it once.

    Args:
        model: the model with all weights available, for example inside the forward of its wrappers.
        forward: the model's own forward.

    Returns:
        The head; not fused if the logits are not computed by a single head, or by other operations.
    """
    try:
        return _learned(model, forward) or Head(fused=False)
    except FORWARD_ERRORS:
        return Head(fused=False)  # the forward fails: reported by the probe


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module, whose hooks still run when it is called."""
    hooked = vars(module).get("forward")  # set by accelerate's hooks
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if hooked is not None:
            vars(module)["forward"] = hooked


def _learned(model: Any, forward: Callable[..., Any]) -> Head | None:
    decoder, module = text_decoder(model), model.get_output_embeddings()
    if not isinstance(module, nn.Module) or decoder is model:
        return None
    # The weight of a quantized head has a different shape.
    vocabulary = getattr(module, "out_features", None) or num_rows(module.weight)
    device = device_of(model)
    products = torch.tensor(_PRODUCTS, device=device)
    hidden: list[Tensor] = []
    seen: list[Tensor] = []

    def replace_hidden(_: nn.Module, __: Any, outputs: Any) -> Any:
        shape = outputs.last_hidden_state.shape
        # Powers of two are exact in all floating dtypes.
        exponents = torch.arange(shape.numel(), device=device).reshape(shape) % 5 - 2
        hidden.append(2.0**exponents)
        outputs.last_hidden_state = hidden[-1]
        return outputs

    def replace_product(x: Tensor) -> Tensor:
        seen.append(x)
        return products[None, :, None].expand(1, -1, vocabulary).clone()

    ids = torch.arange(len(_PRODUCTS), device=device)[None] % min(vocabulary, 8)
    handle = decoder.register_forward_hook(replace_hidden)
    try:
        with (
            forward_of(module, replace_product),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            logits = forward(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(hidden) != 1 or len(seen) != 1 or seen[0].shape != hidden[0].shape:
        return None
    if logits.shape != (1, len(_PRODUCTS), vocabulary):
        return None
    multiplier = _ratio(seen[0], hidden[0])
    rows = logits[0].cpu().double()
    if multiplier is None or (rows - rows[:, :1]).abs().max() > 0:
        return None
    return _fitted(multiplier, products.cpu().double(), rows[:, 0])


def _ratio(x: Tensor, y: Tensor) -> float | None:
    """Return the constant ratio x / y; None if it is not constant."""
    ratio = x.cpu().double() / y.cpu().double()
    middle = ratio.median().item()
    return middle if (ratio - middle).abs().max().item() <= _PRECISION * abs(middle) else None


def _fitted(multiplier: float, products: Tensor, logits: Tensor) -> Head | None:
    scale = (logits[0] / products[0]).item()
    largest = products.abs().max().item()
    reached = logits.abs().max().item()
    softcap = reached if reached < 0.5 * abs(scale) * largest else None
    fitted = scale * products
    if softcap is not None:
        scale = scale if scale * products[0].item() < 1e-2 * softcap else 0.0
        fitted = softcap * torch.tanh(scale * products / softcap)
    if not torch.allclose(fitted, logits, rtol=_PRECISION, atol=0.0):
        return None
    return Head(
        hidden_multiplier=_rounded(multiplier),
        logit_scale=_rounded(scale),
        softcap=None if softcap is None else _rounded(softcap),
    )


def _rounded(value: float) -> float:
    """Round to 6 digits if that is within the precision of float32."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 1e-7 * abs(value) else value
