"""The start-up probe: does the packed step say what the model itself says?

Sharing a prompt, packing rows and fusing the head are exact for the families they were written for, and a
silent error for others (state-space layers, chunked attention, a head nobody foresaw). So each trainer asks
the model at hand once, on a few random tokens, and takes the first way that agrees.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.batch import Layout, pack
from rpo_trainer.errors import ModelError
from rpo_trainer.step import Head, causal_lm, head_of, install, token_logprobs, uninstall

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def probe(
    model: nn.Module, *, layout: Layout | None = None, tile_bytes: int | None = None
) -> tuple[Layout, Head]:
    """Installs the fastest way that agrees with plain forwards, and says which.

    Args:
        model: a causal language model, wrapped or not, with whole weights.
        layout: the only one to try; None: shared, then packed, then padded.
        tile_bytes: size of the head's tiles; None: the default.

    Raises:
        ModelError: no way agrees.
    """
    inner = causal_lm(model)
    uninstall(model)
    head = head_of(inner)
    if tile_bytes is not None:
        head.tile_bytes = tile_bytes
    examples = _random_examples(inner.config.get_text_config().vocab_size)
    training = model.training
    model.eval()
    try:
        expected = _plain(model, examples)
        failures: list[str] = []
        for fused in (True, False):
            for candidate in (layout,) if layout else _LAYOUTS:
                tried = dataclasses.replace(head, fused=fused)
                why = _disagreement(model, examples, candidate, tried, expected)
                if why is None:
                    _report(failures, candidate, tried)
                    return candidate, tried
                name = candidate if fused else f"{candidate} with the model's own logits"
                failures.append(f"{name}: {why}")
    finally:
        model.train(training)
    uninstall(model)
    raise ModelError(
        f"no packed step agrees with plain forwards of {type(inner).__name__}",
        why="; ".join(failures),
        fix="report the model's type, or set attn_implementation='sdpa' when loading it",
    )


def _report(failures: list[str], layout: Layout, head: Head) -> None:
    if failures:
        own = "" if head.fused else " and the model's own logits"
        logger.warning("step layout: %s%s, since %s", layout, own, "; ".join(failures))
    else:
        logger.info("step layout: %s", layout)


def _random_examples(vocabulary: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    return [
        {
            "prompt_ids": tokens(prompt),
            "response_ids": [tokens(n) for n in lengths],
            "response_mask": [[1] * n for n in lengths],
        }
        for prompt, lengths in ((7, (5, 3)), (4, (6, 2, 4)))
    ]


def _plain(model: nn.Module, examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor | None]:
    """Log-probs by one stock forward per response, and one gradient."""
    device = next(model.parameters()).device
    pieces = []
    with torch.enable_grad():
        for example in examples:
            prompt = example["prompt_ids"]
            for response in example["response_ids"]:
                ids = torch.tensor([prompt + response], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                dtype = torch.promote_types(logits.dtype, torch.float32)
                labels = torch.tensor(response, device=device)
                pieces.append(logits.to(dtype).log_softmax(-1).gather(1, labels[:, None])[:, 0])
        return _with_gradient(model, torch.cat(pieces))


def _with_gradient(model: nn.Module, logps: Tensor) -> tuple[Tensor, Tensor | None]:
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is None:
        return logps.detach(), None
    weights = torch.linspace(-1.0, 1.0, len(logps), device=logps.device, dtype=logps.dtype)
    (grad,) = torch.autograd.grad((logps * weights).sum(), [parameter], allow_unused=True)
    return logps.detach(), grad


def _disagreement(
    model: nn.Module,
    examples: list[dict[str, Any]],
    layout: Layout,
    head: Head,
    expected: tuple[Tensor, Tensor | None],
) -> str | None:
    install(model, padded=layout == "padded", head=head)
    device = expected[0].device
    inputs = pack(examples, layout)["model_inputs"]
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    try:
        with torch.enable_grad():
            logps, grad = _with_gradient(model, token_logprobs(model, inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    low = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    # Rounding alone; a token that sees what it should not is off by far more.
    off = (logps - expected[0]).abs().max().item()
    if not off <= (0.25 if low else 1e-3):
        return f"log-probs differ by {off:.2g} nats"
    if grad is not None and expected[1] is not None:
        scale = expected[1].float().norm().clamp_min(1e-12)
        relative = ((grad.float() - expected[1].float()).norm() / scale).item()
        if not relative <= (0.2 if low else 1e-2):
            return f"a gradient differs by {relative:.0%}"
    return None
