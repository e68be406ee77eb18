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

from rpo_trainer.adapters import lowest_precision
from rpo_trainer.batch import Layout, pack, to_device
from rpo_trainer.errors import ModelError
from rpo_trainer.sharding import device_of, has_shards
from rpo_trainer.step import (
    Head,
    causal_lm,
    head_of,
    install,
    is_classifier,
    response_scores,
    token_logprobs,
    uninstall,
)

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def probe(
    model: nn.Module, *, layout: Layout | None = None, tile_bytes: int | None = None
) -> tuple[Layout, Head]:
    """Installs the fastest way that agrees with plain forwards, and says which.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not, with whole weights.
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
    config = inner.config.get_text_config()
    examples = _random_examples(config.vocab_size, avoid=config.pad_token_id)
    training = model.training
    model.eval()
    try:
        plain = _plain_scores if is_classifier(model) else _plain_logprobs
        expected = plain(model, examples)
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


def _random_examples(vocabulary: int, avoid: int | None) -> list[dict[str, Any]]:
    """Two prompts with several responses; a classifier reads its score in front of a pad token."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        found = torch.randint(vocabulary, (n,), generator=generator).tolist()
        return [(token + 1) % vocabulary if token == avoid else token for token in found]

    return [
        {
            "prompt_ids": tokens(prompt),
            "response_ids": [tokens(n) for n in lengths],
            "response_mask": [[1] * n for n in lengths],
        }
        for prompt, lengths in ((7, (5, 3)), (4, (6, 2, 4)))
    ]


def _plain_logprobs(
    model: nn.Module, examples: list[dict[str, Any]]
) -> tuple[Tensor, Tensor | None]:
    """Log-probs by one stock forward per response, and one gradient."""
    device = device_of(model)
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


def _plain_scores(model: nn.Module, examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor | None]:
    """Scores by one stock forward of right-padded rows, as any other tool would do it; and one gradient."""
    inputs = pack(examples, "padded", pad_token_id=_pad_token(model))["model_inputs"]
    device = device_of(model)
    with torch.enable_grad():
        scores = model(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            use_cache=False,
        ).logits
        return _with_gradient(model, scores.to(torch.promote_types(scores.dtype, torch.float32)))


def _pad_token(model: nn.Module) -> int:
    return causal_lm(model).config.get_text_config().pad_token_id or 0


def _with_gradient(model: nn.Module, logps: Tensor) -> tuple[Tensor, Tensor | None]:
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is None or has_shards(model):
        return logps.detach(), None  # an engine wants its gradients for itself
    weights = torch.linspace(-1.0, 1.0, logps.numel(), device=logps.device, dtype=logps.dtype)
    total = (logps.flatten() * weights).sum()
    (grad,) = torch.autograd.grad(total, [parameter], allow_unused=True)
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
    inputs = pack(examples, layout, pad_token_id=_pad_token(model))["model_inputs"]
    inputs = to_device(inputs, device)
    scored = is_classifier(model)
    run = response_scores if scored else token_logprobs
    try:
        with torch.enable_grad():
            logps, grad = _with_gradient(model, run(model, inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    low = lowest_precision(model) in (torch.bfloat16, torch.float16)
    # Rounding alone; a token that sees what it should not is off by far more.
    off = (logps - expected[0]).abs().max().item()
    # A fresh head gives small scores, so theirs is relative to the largest.
    size = (expected[0].abs().max().item() or 1.0) if scored else 1.0
    if not off <= (0.25 if low else 1e-3) * size:
        what = (
            f"scores differ by {off / size:.1%}"
            if scored
            else f"log-probs differ by {off:.2g} nats"
        )
        return what
    if grad is not None and expected[1] is not None:
        scale = expected[1].float().norm().clamp_min(1e-12)
        relative = ((grad.float() - expected[1].float()).norm() / scale).item()
        if not relative <= (0.2 if low else 1e-2):
            return f"a gradient differs by {relative:.0%}"
    return None
