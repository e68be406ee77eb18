"""Triton kernels for the logit head, each of which reads a float32 tile of logits once.

As torch operations (the fallback in `logprobs`), softmax and gradient take about fifteen passes over the
tile, a tenth of the step time on a GPU. Row offsets are 64-bit: a tile may have more than 2³¹ logits.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpo_trainer.step.token_stats import SliceStats

logger = logging.getLogger(__name__)

_BLOCK = 4096  # logits per program
_LEAST = torch.finfo(torch.float32).min  # replaces a maximum of −inf


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the kernels compile for `device`, tried once. Triton requires a C compiler."""
    tile = torch.zeros(1, 1, device=device)
    labels = torch.zeros(1, dtype=torch.long, device=device)
    try:
        logsumexp(tile, labels, 0)
    except Exception as error:  # any error of the machine's compiler or driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "Triton kernels cannot be compiled for %s (%s): the logit head uses slower torch operations; "
            "install a C compiler and the Python headers",
            device,
            reason,
        )
        return False
    return True


def logsumexp(logits: Tensor, labels: Tensor, v0: int) -> tuple[Tensor, Tensor]:
    """Compute the logsumexp of each row and the logit of its label: `[t, w]` → `[t]`, `[t]`, float32.

    Args:
        logits: `[t, w]` float32, a slice of the vocabulary that starts at `v0`; not modified.
        labels: `[t]`, token ids. The logit is 0 if the label is outside the slice.
        v0: token id of the first column.
    """
    rows, width = logits.shape
    blocks = triton.cdiv(width, _BLOCK)
    # Accumulated in float64, since rounding of the partial sums would add to that of the result.
    partial = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _logsumexp_kernel[(rows, blocks)](
            logits, labels.contiguous(), partial, found, v0, width, logits.stride(0),
            LEAST=_LEAST, BLOCK=_BLOCK,
        )  # fmt: skip
    return partial.logsumexp(dim=1).float(), found


def logsumexp_and_stats(
    logits: Tensor, labels: Tensor, v0: int
) -> tuple[Tensor, Tensor, SliceStats]:
    """Return `logsumexp` and the statistics of `token_stats.slice_stats` from one pass over the tile."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, _BLOCK)
    # Of each block: log of the sum of exponentials, largest logit, mean under the block's softmax, sum
    partial = torch.empty(4, rows, blocks, dtype=torch.float64, device=logits.device)
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _logsumexp_and_stats_kernel[(rows, blocks)](
            logits, labels.contiguous(), partial, found, v0, width, logits.stride(0), rows * blocks,
            LEAST=_LEAST, BLOCK=_BLOCK,
        )  # fmt: skip
    lse = partial[0].logsumexp(dim=1)
    weights = (partial[0] - lse[:, None]).exp().nan_to_num(0.0)
    expected = (weights * partial[2]).sum(dim=1).float()
    stats = SliceStats(partial[1].amax(dim=1).float(), expected, partial[3].sum(dim=1).float())
    return lse.float(), found, stats


def slope(
    logits: Tensor,
    normalizer: Tensor,
    labels: Tensor,
    v0: int,
    grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    out: Tensor,
) -> Tensor:
    """Compute grad · (1[label] − softmax) of one tile, times the derivatives of cap and scale, into `out`.

    Args:
        logits: `[t, w]` float32, a slice of the vocabulary that starts at `v0`.
        normalizer: `[t]` float32, logsumexp over the entire vocabulary.
        labels: `[t]`, token ids.
        v0: token id of the first column.
        grad: `[t]` float32, or None for 1.
        logit_scale: factor on the logits before the cap.
        softcap: the cap, or None.
        out: `[t, w]` in any floating dtype; may be `logits`.
    """
    rows, width = logits.shape
    with torch.cuda.device_of(logits):
        _slope_kernel[(rows, triton.cdiv(width, _BLOCK))](
            logits, out, normalizer.contiguous(), labels.contiguous(),
            None if grad is None else grad.contiguous(),
            v0, width, logits.stride(0), out.stride(0), float(logit_scale),
            None if softcap is None else float(softcap), BLOCK=_BLOCK,
        )  # fmt: skip
    return out


# Only constants are annotated: Triton resolves the names in annotations as if they were used.
@triton.jit(do_not_specialize=["v0"])
def _logsumexp_kernel(
    logits,
    labels,
    partial,
    found,
    v0,
    width,
    stride,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + columns, mask=columns < width, other=float("-inf"))
    top = tl.maximum(tl.max(x, axis=0), LEAST)
    total = tl.sum(tl.exp(x - top), axis=0)
    tl.store(partial + row * tl.num_programs(1) + block, top.to(tl.float64) + tl.log(total))
    if block == 0:
        column = tl.load(labels + row).to(tl.int64) - v0
        inside = (column >= 0) & (column < width)
        tl.store(found + row, tl.load(logits + row * stride + column, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["v0"])
def _logsumexp_and_stats_kernel(
    logits,
    labels,
    partial,
    found,
    v0,
    width,
    stride,
    cells,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf"))
    largest = tl.max(x, axis=0)
    top = tl.maximum(largest, LEAST)
    e = tl.exp(x - top)
    total = tl.sum(e, axis=0)
    # Where e is 0 its logit may be −inf, and 0 · −inf is NaN.
    weighted = tl.sum(tl.where(e > 0, e * (x - top), 0.0), axis=0)
    mean = tl.where(total > 0, top + weighted / tl.where(total > 0, total, 1.0), 0.0)
    place = partial + row * tl.num_programs(1) + block
    tl.store(place, top.to(tl.float64) + tl.log(total))
    tl.store(place + cells, largest.to(tl.float64))
    tl.store(place + 2 * cells, mean.to(tl.float64))
    tl.store(place + 3 * cells, tl.sum(tl.where(inside, x, 0.0), axis=0).to(tl.float64))
    if block == 0:
        column = tl.load(labels + row).to(tl.int64) - v0
        within = (column >= 0) & (column < width)
        tl.store(found + row, tl.load(logits + row * stride + column, mask=within, other=0.0))


@triton.jit(do_not_specialize=["v0"])
def _slope_kernel(
    logits,
    out,
    normalizer,
    labels,
    grad,
    v0,
    width,
    stride,
    out_stride,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * stride + columns, mask=inside, other=0.0)
    column = tl.load(labels + row).to(tl.int64) - v0
    column = tl.where((column >= 0) & (column < width), column, -1).to(tl.int32)
    y = tl.where(columns == column, 1.0, 0.0) - tl.exp(x - tl.load(normalizer + row))
    if softcap is not None:
        y *= 1.0 - (x / softcap) * (x / softcap)
    factor = logit_scale
    if grad is not None:
        factor *= tl.load(grad + row)
    tl.store(out + row * out_stride + columns, (y * factor).to(out.dtype.element_ty), mask=inside)
