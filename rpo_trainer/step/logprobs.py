"""Hidden states → log-prob of each response token, without materializing all logits.

Shapes: `N` response tokens, `H` hidden size, `V` vocabulary size, `R` responses.

The head is a matrix product with the vocabulary, followed by a softmax. Its logits `[N, V]` are the largest
tensor of a language model's step, so they are computed in tiles of bounded size: the outer loop is over
slices of the vocabulary, so that each slice of the weight's gradient is written once, the inner loop over
blocks of tokens. The forward saves the log-normalizer of each token, and the tile if there is only one;
otherwise the backward recomputes the tiles.

Tiles are float32 for all input dtypes. A GPU multiplies 16-bit inputs with float32 output at full speed; on a
CPU the inputs are converted to float32 first. Autocast is disabled, since it would round the tile. On a
GPU, the kernels of `head_kernels` read and write each tile once between the products.

torch's chunked `linear_cross_entropy(reduction="none", options=…)` (2.13) is not a replacement: for bfloat16
inputs it returns bfloat16, with errors of 0.03 to 0.10 nats per token instead of 1e-6 here
(`benchmarks/head.py`), and it has no soft-cap and no scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from rpo_trainer.step.token_stats import SliceStats, TokenStats, slice_stats

DEFAULT_LOGITS_CHUNK_BYTES = 512 * 2**20
_LEAST_WIDTH = 1024  # minimum width of a vocabulary slice: narrower products are slow
# Slices are multiples of it: fast GPU kernels require rows aligned to 16 bytes.
_ALIGNED_WIDTH = 64
# On a CPU allocating memory costs more than the arithmetic, so temporary tensors stay small enough to be
# reused by the allocator, or to stay in the cache.
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
    """Compute log softmax(cap(scale · (hidden @ weightᵀ + bias)))[label] of each token.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        labels: `[N]`, token ids.
        bias: `[V]` or None.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma-2).
        logits_chunk_bytes: maximum size of a tile of logits. It also bounds copies of a slice of the weight,
            and of its gradient, in another dtype. The derivative of a soft-cap and a 16-bit copy of a tile's
            gradient are additional, one of each at a time.
        stats: receives the statistics of the tokens' distributions; None: none are computed.

    Returns:
        `[N]`, in nats; float32, or float64 for float64 inputs.
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
    """Compute log-probs from given logits, `[N, V]` → `[N]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def response_sums(token_logprobs: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """Sum over the tokens of each response: `[N]` → `[R]`."""
    return token_logprobs.new_zeros(responses).index_add(0, response_index, token_logprobs)


def _tiles(tokens: int, vocabulary: int, hidden: int, cells: int) -> tuple[int, int]:
    """Return the tokens and vocabulary entries of a tile, with as many tokens as possible.

    A slice of the weight may be copied to another dtype, so its size is bounded by that of a tile.
    """
    block = max(1, min(tokens, cells // min(vocabulary, _LEAST_WIDTH)))
    return block, min(vocabulary, _aligned(max(1, min(cells // block, cells // hidden))))


def _aligned(width: int) -> int:
    return width // _ALIGNED_WIDTH * _ALIGNED_WIDTH or width


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


class _LinearLogProbs(torch.autograd.Function):
    """Forward and backward in tiles, see the module docstring."""

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
        normalizer = torch.full((n,), float("-inf"), dtype=dtype, device=hidden.device)
        target = torch.zeros_like(normalizer)
        # The backward with a saved tile needs memory for a slice of another one.
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
                before = normalizer[t0:t1]
                after = torch.logaddexp(before, total)
                if running is not None and part is not None:
                    running.add(t0, t1, part, before, total, after)
                normalizer[t0:t1] = after
                tile = logits if keep else None
                del logits  # before the next tile is created
        if keep and n:
            width = min(v, max(1, (cells if hidden.is_cuda else min(cells, _CPU_CELLS)) // n))
            width = min(width, max(_LEAST_WIDTH, cells // n - v))
            width = width if width == v else _aligned(width)
        ctx.save_for_backward(hidden, weight, bias, labels, normalizer, tile)
        ctx.settings = (logit_scale, softcap, block, width, dtype)
        if stats is not None:
            stats.finish(normalizer, target, v)
        return target - normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normalizer, tile = ctx.saved_tensors
        logit_scale, softcap, block, width, dtype = ctx.settings
        n, v = hidden.shape[0], weight.shape[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty(n, hidden.shape[1], dtype=dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
        if d_weight is not None and n == 0:
            d_weight.zero_()  # the loops below do not write it
        grad = grad.to(dtype)
        for v0, v1 in _spans(v, width):
            w, b = _slice(weight, bias, v0, v1, hidden)
            dw = None
            if d_weight is not None:
                # Summed over the blocks of tokens in `dtype`, in place if the weight has this dtype. A single
                # block is one product, which a GPU accumulates in float32 and rounds once.
                dw = d_weight[v0:v1]
                at_once = block >= n and dw.dtype == w.dtype
                dw = dw if at_once or dw.dtype == dtype else torch.empty_like(dw, dtype=dtype)
            for t0, t1 in _spans(n, block):
                h = hidden[t0:t1].to(w.dtype)
                logits = tile[:, v0:v1] if tile is not None else None
                if logits is None:
                    logits = _logits(h, w, b, logit_scale, softcap, dtype)
                d_logits = _slope(
                    logits, normalizer[t0:t1], labels[t0:t1], v0, grad[t0:t1], logit_scale, softcap,
                    # The gradient of the bias is summed before rounding.
                    dtype=w.dtype if d_bias is None else dtype,
                    # A saved tile is needed for a second backward; a recomputed one may be overwritten.
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
    """Log-probs with a frozen head.

    The only gradient is that of the hidden states. For each token it is a vector times the upstream gradient,
    so it is computed in the forward, and the backward only scales it.
    """

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
        # All logits of a token are needed at once; the weight is only sliced if it must be copied. Memory
        # holds the logits, and either the pieces they are concatenated from or the temporary of the
        # normalizer.
        copied = weight.dtype != _factor_dtype(hidden)
        slices = list(_spans(v, _aligned(max(1, cells // hidden.shape[1])) if copied else v))
        block = max(1, cells // (2 * v))
        logps = torch.empty(n, dtype=dtype, device=hidden.device)
        target, normalizer_of_all = torch.empty_like(logps), torch.empty_like(logps)
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
            normalizer, found, part = _logsumexp(
                logits, labels[t0:t1], 0, in_place=False, stats=stats
            )
            if running is not None and part is not None:
                nothing = torch.full_like(normalizer, float("-inf"))
                running.add(t0, t1, part, nothing, normalizer, normalizer)
                target[t0:t1], normalizer_of_all[t0:t1] = found, normalizer
            logps[t0:t1] = found - normalizer
            slope = _slope(
                logits, normalizer, labels[t0:t1], 0, None, logit_scale, softcap,
                dtype=h.dtype, in_place=True,
            )  # fmt: skip
            for v0, v1 in slices:
                if len(slices) > 1:
                    w, b = _slice(weight, bias, v0, v1, hidden)
                _add_product(unscaled[t0:t1], slope[:, v0:v1], w, first=v0 == 0)
            del logits, slope
        ctx.save_for_backward(unscaled.to(hidden.dtype))
        if stats is not None:
            stats.finish(normalizer_of_all, target, v)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unscaled,) = ctx.saved_tensors
        return (unscaled * grad[:, None].to(unscaled.dtype), *[None] * 7)


def _slope(
    logits: Tensor,
    normalizer: Tensor,
    labels: Tensor,
    v0: int,
    grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """Compute grad · d log-prob / d (hidden @ weightᵀ) of one tile, in `dtype`.

    This is grad · (1[label] − softmax), times the derivatives of cap and scale. `in_place` may overwrite the
    tile.
    """
    if (kernels := _kernels(logits)) is not None:
        fits = in_place and dtype == logits.dtype
        out = logits if fits else logits.new_empty(logits.shape, dtype=dtype)
        return kernels.slope(  # type: ignore[no-any-return]
            logits, normalizer, labels, v0, grad, logit_scale, softcap, out
        )
    cap = None if softcap is None else 1.0 - (logits / softcap).square()
    slope = torch.sub(logits, normalizer[:, None], out=logits if in_place else None)
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
    """Return the module `head_kernels` if it supports this tile, otherwise None.

    Tensor subclasses (fake, distributed) are not supported.
    """
    if not logits.is_cuda or logits.dtype != torch.float32 or type(logits) is not Tensor:
        return None
    if not has_triton():
        return None
    from rpo_trainer.step import head_kernels  # importing Triton is slow

    return head_kernels if head_kernels.works_on(logits.device) else None


def _factor_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the factors of a product.

    A GPU can return the product of two 16-bit matrices in float32; a CPU would round it, so the factors are
    converted to float32.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return hidden.dtype
    return torch.promote_types(hidden.dtype, torch.float32)


def _slice(
    weight: Tensor, bias: Tensor | None, v0: int, v1: int, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return a slice of the head as a factor, rounded to the dtype of the hidden states (for autocast)."""
    w = weight[v0:v1].to(hidden.dtype).to(_factor_dtype(hidden))
    return w, None if bias is None else bias[v0:v1]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b as a new tensor in `dtype`: that of the factors, or float32 for 16-bit ones on a GPU."""
    if a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Compute total += a @ b, or total = a @ b if it is the first product."""
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
    """Compute one tile of logits as a new tensor in `dtype`."""
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
    """Compute for each row the logsumexp, the logit of its label (0 if outside), and the statistics.

    Shapes: `[t, w]` → `[t]` each. `in_place` may overwrite the tile; torch.logsumexp allocates another.

    Args:
        stats: which statistics to compute; None: none.
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
    # Avoid −inf − −inf for a slice of only −inf (a vocabulary padded by its bias).
    top = logits.amax(dim=1).clamp_min_(torch.finfo(logits.dtype).min)
    shifted = torch.sub(logits, top[:, None], out=logits if in_place else None)
    return shifted.exp_().sum(dim=1).log_().add_(top)


def _where(labels: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Return the column of each label in the slice (0 if outside), and whether it is inside."""
    inside = (labels >= v0) & (labels < v1)
    return torch.where(inside, labels - v0, labels.new_zeros(()))[:, None], inside
