"""Hidden states → log-probability of each response token, without ever holding all the logits.

Shapes: `N` response tokens, `H` hidden size, `V` vocabulary, `R` responses.

The head is a matrix product with the vocabulary, then a softmax. Its logits `[N, V]` are the largest
tensor of a language model's step, so they are made in tiles of bounded size: slices of the vocabulary
outermost, so that each slice of the weight's gradient is written once, and blocks of tokens within. The
forward keeps the log of each token's normaliser, and the tile too if a single one is enough; otherwise
the backward makes the tiles again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DEFAULT_TILE_BYTES = 512 * 2**20


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> Tensor:
    """log softmax(cap(scale · (hidden @ weightᵀ + bias)))[label] of each token.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        labels: `[N]`, token ids.
        bias: `[V]` or None.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma-2).
        tile_bytes: the most that one tile of logits may take.

    Returns:
        `[N]`, nats; float32, or float64 for float64 inputs.
    """
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be positive, got {tile_bytes}")
    frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    learns = torch.is_grad_enabled() and hidden.requires_grad
    function: Any = _FrozenHeadLogProbs if frozen and learns else _LinearLogProbs
    return function.apply(  # type: ignore[no-any-return]
        hidden, weight, bias, labels, logit_scale, softcap, tile_bytes
    )


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits that are already there, `[N, V]` → `[N]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def response_sums(token_logprobs: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """Sum over the tokens of each response: `[N]` → `[R]`."""
    return token_logprobs.new_zeros(responses).index_add(0, response_index, token_logprobs)


def _tiles(tokens: int, vocabulary: int, itemsize: int, tile_bytes: int) -> tuple[int, int]:
    """Tokens and vocabulary entries of one tile: whole tokens first, since slices write dW once."""
    cells = max(1, tile_bytes // itemsize)
    token_block = min(tokens, max(1, cells // min(vocabulary, 1024)))
    return token_block, min(vocabulary, max(1, cells // token_block))


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


class _LinearLogProbs(torch.autograd.Function):
    """Forward and backward by tiles; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_scale: float,
        softcap: float | None,
        tile_bytes: int,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        n, v = hidden.shape[0], weight.shape[0]
        block, width = _tiles(n, v, dtype.itemsize, tile_bytes)
        normaliser = torch.full((n,), float("-inf"), dtype=dtype, device=hidden.device)
        target = torch.zeros_like(normaliser)
        keep = block == n and width == v and any(ctx.needs_input_grad[:3])
        tile = None
        for v0, v1 in _spans(v, width):
            w, b = _slice(weight, bias, v0, v1, hidden)
            for t0, t1 in _spans(n, block):
                logits = _logits(hidden[t0:t1], w, b, logit_scale, softcap, dtype)
                index, inside = _where(labels[t0:t1], v0, v1)
                found = logits.gather(1, index).squeeze(1)
                target[t0:t1] += torch.where(inside, found, found.new_zeros(()))
                normaliser[t0:t1] = torch.logaddexp(normaliser[t0:t1], logits.logsumexp(dim=1))
                tile = logits if keep else None
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser, tile)
        ctx.settings = (logit_scale, softcap, block, width, dtype)
        return target - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser, tile = ctx.saved_tensors
        logit_scale, softcap, block, width, dtype = ctx.settings
        n, v = hidden.shape[0], weight.shape[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros(n, hidden.shape[1], dtype=dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.empty_like(bias) if wants_bias else None
        grad = grad.to(dtype)
        for v0, v1 in _spans(v, width):
            w, b = _slice(weight, bias, v0, v1, hidden)
            dw = db = None
            for t0, t1 in _spans(n, block):
                h = hidden[t0:t1]
                logits = tile
                if logits is None:
                    logits = _logits(h, w, b, logit_scale, softcap, dtype)
                d_logits = _slope(
                    logits, normaliser[t0:t1], _where(labels[t0:t1], v0, v1), logit_scale, softcap,
                    # A kept tile stays as it is, for a second backward; one made here is used up.
                    in_place=tile is None,
                )  # fmt: skip
                d_logits.mul_(grad[t0:t1, None])
                if wants_hidden:
                    d_hidden[t0:t1].addmm_(d_logits, w.to(dtype))
                if wants_weight:
                    part = d_logits.t() @ h.to(dtype)
                    dw = part if dw is None else dw.add_(part)
                if wants_bias:
                    total = d_logits.sum(dim=0)
                    db = total if db is None else db.add_(total)
            if d_weight is not None and dw is not None:
                d_weight[v0:v1] = dw
            if d_bias is not None and db is not None:
                d_bias[v0:v1] = db
        return (
            d_hidden.to(hidden.dtype) if wants_hidden else None,
            d_weight,
            d_bias,
            None,
            None,
            None,
            None,
        )


class _FrozenHeadLogProbs(torch.autograd.Function):
    """With a frozen head the only gradient is the hidden states'. Per token it is one vector times the
    upstream gradient, so it is made with the forward's logits, and the backward is a scaling."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_scale: float,
        softcap: float | None,
        tile_bytes: int,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        n, v = hidden.shape[0], weight.shape[0]
        w, b = _slice(weight, bias, 0, v, hidden)
        logps = torch.empty(n, dtype=dtype, device=hidden.device)
        unscaled = torch.empty(n, hidden.shape[1], dtype=dtype, device=hidden.device)
        for t0, t1 in _spans(n, max(1, tile_bytes // (dtype.itemsize * v))):
            logits = _logits(hidden[t0:t1], w, b, logit_scale, softcap, dtype)
            index, inside = _where(labels[t0:t1], 0, v)
            normaliser = logits.logsumexp(dim=1)
            logps[t0:t1] = logits.gather(1, index).squeeze(1) - normaliser
            slope = _slope(logits, normaliser, (index, inside), logit_scale, softcap, in_place=True)
            torch.mm(slope, w.to(dtype), out=unscaled[t0:t1])
        ctx.save_for_backward(unscaled.to(hidden.dtype))
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unscaled,) = ctx.saved_tensors
        return (unscaled * grad[:, None].to(unscaled.dtype), *[None] * 6)


def _slope(
    logits: Tensor,
    normaliser: Tensor,
    where: tuple[Tensor, Tensor],
    logit_scale: float,
    softcap: float | None,
    *,
    in_place: bool,
) -> Tensor:
    """d log-prob / d (hidden @ weightᵀ) of one tile: (1[label] − softmax), through cap and scale."""
    cap = None if softcap is None else 1.0 - (logits / softcap).square()
    slope = torch.sub(logits, normaliser[:, None], out=logits if in_place else None)
    slope.exp_().neg_()
    index, inside = where
    slope.scatter_add_(1, index, inside[:, None].to(slope.dtype))
    if cap is not None:
        slope.mul_(cap)
    return slope.mul_(logit_scale) if logit_scale != 1.0 else slope


def _slice(
    weight: Tensor, bias: Tensor | None, v0: int, v1: int, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Part of the head, in the dtype of the hidden states (they differ under autocast)."""
    w = weight[v0:v1].to(hidden.dtype)
    return w, None if bias is None else bias[v0:v1]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """One tile of logits, a fresh tensor in `dtype`."""
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits += bias.to(dtype)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _where(labels: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Column of each label within the slice (0 if it lies elsewhere), and whether it lies there."""
    inside = (labels >= v0) & (labels < v1)
    return torch.where(inside, labels - v0, labels.new_zeros(()))[:, None], inside
