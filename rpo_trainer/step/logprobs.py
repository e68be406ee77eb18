"""Hidden states → log-probability of each response token, without ever holding all the logits.

Shapes: `N` response tokens, `H` hidden size, `V` vocabulary, `R` responses.

The head is a matrix product with the vocabulary, then a softmax. Its logits `[N, V]` are the largest
tensor of a language model's step, so they are made in tiles of bounded size: slices of the vocabulary
outermost, so that each slice of the weight's gradient is written once, and blocks of tokens within. The
forward keeps the log of each token's normaliser, and the tile too if a single one is enough; otherwise
the backward makes the tiles again.

Tiles are float32 whatever the inputs are. A GPU multiplies halves into float32 at full speed, so there the
factors stay as they are; on a CPU they are widened first. Autocast has no say in it: it would round the tile.
Between the products a GPU reads and writes the tile once each, in the kernels of `head_kernels`.

torch's chunked `linear_cross_entropy(reduction="none", options=…)` (2.13) does not replace it: for bfloat16
inputs it returns bfloat16, 0.03 to 0.10 nats a token off, where these are float32 and 1e-6 off
(`benchmarks/head.py`); and it has no soft-cap and no scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from rpo_trainer.step.token_stats import SliceStats, TokenStats, slice_stats

DEFAULT_LOGITS_CHUNK_BYTES = 512 * 2**20
_LEAST_WIDTH = 1024  # of a slice of the vocabulary: narrower products are slow
# Slices are multiples of it: a GPU's fast kernels take rows that start at multiples of 16 bytes.
_ALIGNED_WIDTH = 64
# On a CPU fresh memory costs more than the arithmetic on it, so what is made for a moment stays small enough
# to be used again: by the allocator, or by the cache.
_CPU_CELLS = 2**22
_CACHED_CELLS = 2**19


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_chunk_bytes: int = DEFAULT_LOGITS_CHUNK_BYTES,
    stats: TokenStats | None = None,
) -> Tensor:
    """log softmax(cap(scale · (hidden @ weightᵀ + bias)))[label] of each token.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        labels: `[N]`, token ids.
        bias: `[V]` or None.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma-2).
        logits_chunk_bytes: the most that one tile of logits may take. The copies that a product in another
            dtype needs of a slice of the weight, and of its gradient, are held to it too; a soft-cap's slope
            and halves of a tile's gradient come on top, one of each at a time.
        stats: gets the statistics of the tokens' distributions.

    Returns:
        `[N]`, nats; float32, or float64 for float64 inputs.
    """
    if logits_chunk_bytes < 1:
        raise ValueError(f"logits_chunk_bytes must be positive, got {logits_chunk_bytes}")
    frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
    learns = torch.is_grad_enabled() and hidden.requires_grad
    function: Any = _FrozenHeadLogProbs if frozen and learns else _LinearLogProbs
    return function.apply(  # type: ignore[no-any-return]
        hidden, weight, bias, labels, logit_scale, softcap, logits_chunk_bytes, stats
    )


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits that are already there, `[N, V]` → `[N]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def response_sums(token_logprobs: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """Sum over the tokens of each response: `[N]` → `[R]`."""
    return token_logprobs.new_zeros(responses).index_add(0, response_index, token_logprobs)


def _tiles(tokens: int, vocabulary: int, hidden: int, cells: int) -> tuple[int, int]:
    """Tokens and vocabulary entries of one tile: whole tokens first, since slices write dW once.

    A slice of the weight may have to be copied, in another dtype, so it takes no more than a tile either.
    """
    block = max(1, min(tokens, cells // min(vocabulary, _LEAST_WIDTH)))
    return block, min(vocabulary, _aligned(max(1, min(cells // block, cells // hidden))))


def _aligned(width: int) -> int:
    return width // _ALIGNED_WIDTH * _ALIGNED_WIDTH or width


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
        logits_chunk_bytes: int,
        stats: TokenStats | None,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        n, v = hidden.shape[0], weight.shape[0]
        cells = max(1, logits_chunk_bytes // dtype.itemsize)
        block, width = _tiles(n, v, hidden.shape[1], cells)
        normaliser = torch.full((n,), float("-inf"), dtype=dtype, device=hidden.device)
        target = torch.zeros_like(normaliser)
        # The backward of a tile that is kept needs a slice of another beside it.
        keep = width == v and n * (v + _LEAST_WIDTH) <= cells and any(ctx.needs_input_grad[:3])
        running = None if stats is None else stats.begin(n, dtype, hidden.device)
        tile = None
        for v0, v1 in _spans(v, width):
            w, b = _slice(weight, bias, v0, v1, hidden)
            for t0, t1 in _spans(n, block):
                h = hidden[t0:t1].to(w.dtype)
                logits = _logits(h, w, b, logit_scale, softcap, dtype)
                total, found, part = _logsumexp(
                    logits, labels[t0:t1], v0, in_place=not keep, stats=stats
                )
                target[t0:t1] += found
                before = normaliser[t0:t1]
                after = torch.logaddexp(before, total)
                if running is not None and part is not None:
                    running.add(t0, t1, part, before, total, after)
                normaliser[t0:t1] = after
                tile = logits if keep else None
                del logits  # before the next tile is made
        if keep and n:
            width = min(v, max(1, (cells if hidden.is_cuda else min(cells, _CPU_CELLS)) // n))
            width = min(width, max(_LEAST_WIDTH, cells // n - v))
            width = width if width == v else _aligned(width)
        ctx.save_for_backward(hidden, weight, bias, labels, normaliser, tile)
        ctx.settings = (logit_scale, softcap, block, width, dtype)
        if stats is not None:
            stats.finish(normaliser, target, v)
        return target - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normaliser, tile = ctx.saved_tensors
        logit_scale, softcap, block, width, dtype = ctx.settings
        n, v = hidden.shape[0], weight.shape[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty(n, hidden.shape[1], dtype=dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
        if d_weight is not None and n == 0:
            d_weight.zero_()  # nothing below would write it
        grad = grad.to(dtype)
        for v0, v1 in _spans(v, width):
            w, b = _slice(weight, bias, v0, v1, hidden)
            dw = None
            if d_weight is not None:
                # Summed over the blocks of tokens in `dtype`, in its place where that is its own. A single
                # block is one product, which a GPU sums in float32 and rounds once.
                dw = d_weight[v0:v1]
                at_once = block >= n and dw.dtype == w.dtype
                dw = dw if at_once or dw.dtype == dtype else torch.empty_like(dw, dtype=dtype)
            for t0, t1 in _spans(n, block):
                h = hidden[t0:t1].to(w.dtype)
                logits = tile[:, v0:v1] if tile is not None else None
                if logits is None:
                    logits = _logits(h, w, b, logit_scale, softcap, dtype)
                d_logits = _slope(
                    logits, normaliser[t0:t1], labels[t0:t1], v0, grad[t0:t1], logit_scale, softcap,
                    # The sum over tokens takes them before they are rounded.
                    dtype=w.dtype if d_bias is None else dtype,
                    # A kept tile stays as it is, for a second backward; one made here is used up.
                    in_place=tile is None,
                )  # fmt: skip
                if d_bias is not None:
                    d_bias[v0:v1] += d_logits.sum(dim=0)
                d_logits = d_logits.to(w.dtype)
                if wants_hidden:
                    _add_product(d_hidden[t0:t1], d_logits, w, first=v0 == 0)
                if dw is not None:
                    _add_product(dw, d_logits.t(), h, first=t0 == 0)
                del logits, d_logits
            if d_weight is not None and dw is not None and dw.dtype != d_weight.dtype:
                d_weight[v0:v1] = dw
        return (
            d_hidden.to(hidden.dtype) if wants_hidden else None,
            d_weight,
            None if bias is None or d_bias is None else d_bias.to(bias.dtype),
            None,
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
        logits_chunk_bytes: int,
        stats: TokenStats | None,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        n, v = hidden.shape[0], weight.shape[0]
        cells = max(1, logits_chunk_bytes // dtype.itemsize)
        # All logits of a token are needed at once; only a weight that has to be copied is cut. Beside the
        # logits lie the pieces they are joined from, then what their normaliser is summed over.
        copied = weight.dtype != _factor_dtype(hidden)
        slices = list(_spans(v, _aligned(max(1, cells // hidden.shape[1])) if copied else v))
        block = max(1, cells // (2 * v))
        logps = torch.empty(n, dtype=dtype, device=hidden.device)
        target, normaliser_of_all = torch.empty_like(logps), torch.empty_like(logps)
        running = None if stats is None else stats.begin(n, dtype, hidden.device)
        unscaled = torch.empty(n, hidden.shape[1], dtype=dtype, device=hidden.device)
        for t0, t1 in _spans(n, block):
            h = hidden[t0:t1].to(_factor_dtype(hidden))
            pieces = []
            for v0, v1 in slices:
                w, b = _slice(weight, bias, v0, v1, hidden)
                pieces.append(_logits(h, w, b, logit_scale, softcap, dtype))
            logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            del pieces
            normaliser, found, part = _logsumexp(
                logits, labels[t0:t1], 0, in_place=False, stats=stats
            )
            if running is not None and part is not None:
                nothing = torch.full_like(normaliser, float("-inf"))
                running.add(t0, t1, part, nothing, normaliser, normaliser)
                target[t0:t1], normaliser_of_all[t0:t1] = found, normaliser
            logps[t0:t1] = found - normaliser
            slope = _slope(
                logits, normaliser, labels[t0:t1], 0, None, logit_scale, softcap,
                dtype=h.dtype, in_place=True,
            )  # fmt: skip
            for v0, v1 in slices:
                if len(slices) > 1:
                    w, b = _slice(weight, bias, v0, v1, hidden)
                _add_product(unscaled[t0:t1], slope[:, v0:v1], w, first=v0 == 0)
            del logits, slope
        ctx.save_for_backward(unscaled.to(hidden.dtype))
        if stats is not None:
            stats.finish(normaliser_of_all, target, v)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unscaled,) = ctx.saved_tensors
        return (unscaled * grad[:, None].to(unscaled.dtype), *[None] * 7)


def _slope(
    logits: Tensor,
    normaliser: Tensor,
    labels: Tensor,
    v0: int,
    grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """grad · d log-prob / d (hidden @ weightᵀ) of one tile, in `dtype`: grad · (1[label] − softmax), through
    cap and scale. In place it may use the tile up."""
    if (kernels := _kernels(logits)) is not None:
        fits = in_place and dtype == logits.dtype
        out = logits if fits else logits.new_empty(logits.shape, dtype=dtype)
        return kernels.slope(  # type: ignore[no-any-return]
            logits, normaliser, labels, v0, grad, logit_scale, softcap, out
        )
    cap = None if softcap is None else 1.0 - (logits / softcap).square()
    slope = torch.sub(logits, normaliser[:, None], out=logits if in_place else None)
    slope.exp_().neg_()
    index, inside = _where(labels, v0, v0 + logits.shape[1])
    slope.scatter_add_(1, index, inside[:, None].to(slope.dtype))
    if cap is not None:
        slope.mul_(cap)
    if logit_scale != 1.0:
        slope.mul_(logit_scale)
    if grad is not None:
        slope.mul_(grad[:, None])
    return slope.to(dtype)


def _kernels(logits: Tensor) -> Any:
    """The module `head_kernels` where it can take this tile, or None. Tensors of other types (fake,
    distributed) are not plain memory."""
    if not logits.is_cuda or logits.dtype != torch.float32 or type(logits) is not Tensor:
        return None
    if not has_triton():
        return None
    from rpo_trainer.step import head_kernels  # Triton takes long to import

    return head_kernels if head_kernels.works_on(logits.device) else None


def _factor_dtype(hidden: Tensor) -> torch.dtype:
    """What the factors of a product are held in. A GPU sums the product of two halves in float32 and hands
    that over; a CPU would round it to half, so there they are widened."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return hidden.dtype
    return torch.promote_types(hidden.dtype, torch.float32)


def _slice(
    weight: Tensor, bias: Tensor | None, v0: int, v1: int, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Part of the head as a factor, in the precision of the hidden states (they differ under autocast)."""
    w = weight[v0:v1].to(hidden.dtype).to(_factor_dtype(hidden))
    return w, None if bias is None else bias[v0:v1]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, a fresh tensor in `dtype`: the factors' own, or float32 for halves on a GPU."""
    if a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b where it is the first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(_product(a, b, total.dtype))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """One tile of logits, a fresh tensor in `dtype`."""
    logits = _product(hidden, weight.t(), dtype)
    if bias is not None:
        logits += bias.to(dtype)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _logsumexp(
    logits: Tensor, labels: Tensor, v0: int, *, in_place: bool, stats: TokenStats | None = None
) -> tuple[Tensor, Tensor, SliceStats | None]:
    """Of each row, its label's logit (0 if it lies elsewhere), and its statistics: `[t, w]` → `[t]` each.

    In place it may use the tile up, where torch's own takes a second one.

    Args:
        stats: the statistics that are wanted; None: none.
    """
    if (kernels := _kernels(logits)) is not None:
        if stats is None:
            return (*kernels.logsumexp(logits, labels, v0), None)
        return kernels.logsumexp_and_stats(logits, labels, v0)  # type: ignore[no-any-return]
    index, inside = _where(labels, v0, v0 + logits.shape[1])
    found = logits.gather(1, index).squeeze(1)
    found = torch.where(inside, found, found.new_zeros(()))
    rows = len(logits) if logits.is_cuda else max(1, _CACHED_CELLS // logits.shape[1])
    blocks = torch.split(logits, max(1, rows))
    if stats is None:
        return torch.cat([_rows_logsumexp(part, in_place) for part in blocks]), found, None
    of_blocks = [slice_stats(part, with_mean=stats.with_mean, in_place=in_place) for part in blocks]
    tops, means, totals = zip(*(part for part, _ in of_blocks), strict=True)
    total = torch.cat(totals) if stats.with_mean else None
    joined = SliceStats(torch.cat(tops), torch.cat(means), total)
    return torch.cat([lse for _, lse in of_blocks]), found, joined


def _rows_logsumexp(logits: Tensor, in_place: bool) -> Tensor:
    # A slice that is −inf throughout (a vocabulary padded by its bias) must not become −inf − −inf.
    top = logits.amax(dim=1).clamp_min_(torch.finfo(logits.dtype).min)
    shifted = torch.sub(logits, top[:, None], out=logits if in_place else None)
    return shifted.exp_().sum(dim=1).log_().add_(top)


def _where(labels: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Column of each label within the slice (0 if it lies elsewhere), and whether it lies there."""
    inside = (labels >= v0) & (labels < v1)
    return torch.where(inside, labels - v0, labels.new_zeros(()))[:, None], inside
