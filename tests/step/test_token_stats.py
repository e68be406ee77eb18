"""Accuracy, entropy and mean logit of tokens from the head's tiles, compared with full logits in float64."""

from __future__ import annotations

import pytest
import torch

from rpo_trainer.step.logprobs import linear_logprobs
from rpo_trainer.step.token_stats import TokenStats

N, H, V = 37, 16, 301


@pytest.mark.parametrize("tile_bytes", [8 * 40, 8 * 900, 2**29])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias", "capped", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_from_whole_logits(tile_bytes, frozen, kind, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype).requires_grad_(not frozen)
    bias = torch.randn(V, dtype=dtype) if kind in ("bias", "padded") else None
    if kind == "padded":
        bias[250:] = float("-inf")
    settings = {"logit_scale": 0.5, "softcap": 3.0} if kind == "capped" else {}
    logits = (hidden @ weight.t()).double().detach()
    if bias is not None:
        logits = logits + bias.double()
    if kind == "capped":
        logits = 3.0 * torch.tanh(0.5 * logits / 3.0)
    labels = logits.argmax(1)
    labels[::3] = torch.randint(250, (len(labels[::3]),))
    stats = TokenStats(with_mean=True)
    logps = linear_logprobs(
        hidden, weight, labels, bias, logits_chunk_bytes=tile_bytes, stats=stats, **settings
    )
    plain = linear_logprobs(hidden, weight, labels, bias, logits_chunk_bytes=tile_bytes, **settings)
    torch.testing.assert_close(logps, plain, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
    probabilities = logits.softmax(1)
    entropy = torch.special.entr(probabilities).sum(1)
    bound = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-4}
    assert torch.equal(stats.correct, logits.argmax(1) == labels)
    torch.testing.assert_close(stats.entropy.double(), entropy, **bound)
    torch.testing.assert_close(stats.mean_logit.double(), logits.mean(1), **bound)
    whole = TokenStats(with_mean=True)
    whole.set_from_logits(logits, labels)
    torch.testing.assert_close(whole.entropy, entropy)
    assert torch.equal(whole.correct, stats.correct)
    gradients = torch.autograd.grad(logps.sum(), hidden), torch.autograd.grad(plain.sum(), hidden)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_without_tokens():
    stats = TokenStats()
    linear_logprobs(
        torch.zeros(0, H), torch.zeros(V, H), torch.zeros(0, dtype=torch.long), stats=stats
    )
    assert stats.entropy.shape == stats.correct.shape == (0,) and stats.mean_logit is None
