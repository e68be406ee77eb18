"""Attention of a packed row with torch's FlexAttention: fused soft-capped scores and attention sinks.

The scores of a row of `T` tokens are never written to memory, so memory is O(T), not O(T²).

Shapes: `T` tokens of the row, `S` segments, `N` blocks of 128 tokens, `D` head size.

A query attends to two ranges of keys: its own segment up to itself, and the segment's prefix (the shared
prompt). A sliding window moves the first key of each range. `FlexIndex` computes the ranges and, from their
bounds over each block of queries, which blocks of keys a kernel visits, in O(N²). torch's
`create_block_mask` needs O(T²) memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._triton import has_triton

_BLOCK = 128  # tokens; a multiple of the kernels' blocks of queries and keys

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Shared memory per thread block of an A100 (an H100 has more), for which torch's settings are tuned.
_LARGE_SHARED_MEMORY = 160 * 1024
_TUNED_SIZES = (64, 128, 256)


# One for each combination of soft-cap, scale, tensors with gradients, and rows of a single block.
_COMPILATIONS = 64


@dataclass
class FlexIndex:
    """The segments of a row, and tensors computed from them once per step on their device.

    Attributes:
        spans: `[S, 4]` int32: start, stop, prefix start, prefix stop of each segment; segments tile the row.
        tokens: T.
    """

    spans: Tensor
    tokens: int
    _masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int, int]]) -> FlexIndex:
        """Create it from (start, stop, prefix start, prefix stop) of segments that tile the row."""
        return cls(torch.tensor(segments, dtype=torch.int32), segments[-1][1])

    def map(self, move: Callable[[Tensor], Tensor]) -> FlexIndex:
        """Return a copy with `move` applied to all tensors."""
        return FlexIndex(move(self.spans), self.tokens)

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the block mask, computed once for all layers with this window.

        Args:
            window: number of visible positions including the query's; None for no limit.
        """
        if window not in self._masks:
            self._masks[window] = _block_mask(*self._runs(window))
        return self._masks[window]

    @functools.cached_property
    def positions(self) -> Tensor:
        """`[T]` int32, position of each token in its prompt + response."""
        start, _, prefix_start, prefix_stop = self._by_token()
        return self._tokens() - start + prefix_stop - prefix_start

    def _tokens(self) -> Tensor:
        return torch.arange(self.tokens, dtype=torch.int32, device=self.spans.device)

    def _by_token(self) -> tuple[Tensor, ...]:
        lengths = self.spans[:, 1] - self.spans[:, 0]
        # An explicit size avoids synchronizing with the device.
        return self.spans.repeat_interleave(lengths, dim=0, output_size=self.tokens).unbind(1)

    def _runs(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each query, `[T]` int32: first key in its segment; first key and end of its prefix."""
        start, _, prefix_start, prefix_stop = self._by_token()
        if window is None:
            return start.contiguous(), prefix_start.contiguous(), prefix_stop.contiguous()
        first = self.positions - window + 1  # position of the first key in the window
        return (
            torch.maximum(start, self._tokens() - window + 1),
            torch.minimum(torch.maximum(prefix_start, prefix_start + first), prefix_stop),
            prefix_stop.contiguous(),
        )


def _block_mask(own: Tensor, prefix: Tensor, prefix_stop: Tensor) -> BlockMask:
    """Create it from the key ranges `own[q] … q` and `prefix[q] … prefix_stop[q] - 1` of each query."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= own[query]) & (key <= query)
        return in_own | ((key >= prefix[query]) & (key < prefix_stop[query]))

    tokens = own.shape[0]
    blocks = -(-tokens // _BLOCK)
    rows = torch.arange(blocks * _BLOCK, dtype=torch.int32, device=own.device)
    rows = rows.clamp(max=tokens - 1).view(blocks, _BLOCK)  # padded with the last query
    # First and last token of each block of keys.
    low = torch.arange(blocks, dtype=torch.int32, device=own.device) * _BLOCK
    high = low + (_BLOCK - 1)
    own_low, own_high = (x[:, None] for x in own[rows].aminmax(dim=1))
    prefix_rows, stop_rows = prefix[rows], prefix_stop[rows]
    prefix_low = torch.where(prefix_rows < stop_rows, prefix_rows, tokens).amin(1)[:, None]
    prefix_high = prefix_rows.amax(1)[:, None]
    stop_low, stop_high = (x[:, None] for x in stop_rows.aminmax(dim=1))
    first, last = low[:, None], high.clamp(max=tokens - 1)[:, None]
    # A block that any query can attend to is visited; one that all queries fully attend to needs no mask.
    visited = (own_low <= high) & (last >= low)
    visited |= (prefix_low <= high) & (stop_high > low)
    whole = (own_high <= low) & (first >= high)
    whole |= (prefix_high <= low) & (stop_low > high)
    whole &= first + _BLOCK <= tokens
    return BlockMask.from_kv_blocks(
        *_listed(visited & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of each query block, and all key blocks with these first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None], order[None, None]


def applies(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> bool:
    """Whether the kernels support these tensors, `[1, heads, T, D]`; their values are not read.

    The kernels have no dropout, require the same dtype of all tensors (16-bit or float32), and head sizes
    from 16 (the minimum of a matrix product in Triton) to 256 (the maximum for which torch has settings).
    """
    return (
        dropout == 0.0
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape[-1] == query.shape[-1]
        and all(16 <= x.shape[-1] <= 256 for x in (query, value))
        and _has_kernel(query.device)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernel(device: torch.device) -> bool:
    """Whether Triton can compile the kernels: CUDA GPUs with compute capability 8.0 (A100) or higher."""
    return (
        device.type == "cuda"
        and torch.version.hip is None  # not tested
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and has_triton()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_options(size: int, itemsize: int, device: torch.device) -> dict[str, Any]:
    """Return kernel settings that fit the GPU's shared memory.

    torch has settings for head sizes 64, 128 and 256 on an A100, H100 or B200. Otherwise the four tiles of a
    token block that a kernel holds without prefetching are limited to 64 KiB; consumer GPUs have 99 KiB.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}  # one kernel for rows of all lengths
    properties: Any = torch.cuda.get_device_properties(device)
    memory = properties.shared_memory_per_block_optin
    if size not in _TUNED_SIZES or memory < _LARGE_SHARED_MEMORY:
        rounded = 1 << (size - 1).bit_length()  # as the kernels do
        block = 32 if rounded * itemsize <= 512 else 16
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options |= dict.fromkeys(names, block) | {"num_stages": 1, "num_warps": 4}
    return options


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: FlexIndex,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of one layer over a packed row.

    Args:
        query: `[1, heads, T, D]`.
        key: `[1, kv_heads, T, D]`.
        value: `[1, kv_heads, T, Dv]`.
        index: index of the row, on the same device.
        scaling: factor on the scores; None for 1 / √D.
        sliding_window: number of visible positions including the query's.
        softcap: scores become `softcap · tanh(scores / softcap)` (Gemma-2).
        sinks: `[heads]`, an additional score of each query without a value (GPT-OSS).

    Returns:
        `[1, T, heads, Dv]`.
    """
    size = max(query.shape[-1], value.shape[-1])
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        out = _compiled(
            query,
            key,
            value,
            index.block_mask(sliding_window),
            _constant(scaling),
            _constant(softcap),
            sinks,
            _kernel_options(size, query.itemsize, query.device),
        )
    return out.transpose(1, 2).contiguous()


def _constant(number: float | None) -> str | None:
    """Return a number as text, which the compiler treats as a constant.

    A float with a second value becomes a symbolic variable, which FlexAttention's functions do not support.
    """
    return None if number is None else repr(float(number))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scaling: str | None,
    softcap: str | None,
    sinks: Tensor | None,
    kernel_options: dict[str, Any],
) -> Tensor:
    def modified(
        score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor
    ) -> Tensor:
        if softcap is not None:
            score = float(softcap) * torch.tanh(score / float(softcap))
        return score

    attention: Any = flex_attention  # its overloads do not accept Optional values
    result = attention(
        query,
        key,
        value,
        score_mod=modified,
        block_mask=block_mask,
        scale=None if scaling is None else float(scaling),
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=kernel_options,
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    out: Tensor = result if sinks is None else result[0]
    if sinks is None:
        return out
    lse: Tensor = result[1].lse
    # exp(lse) / (exp(lse) + exp(sink)): the fraction of the weights that remains for the keys.
    share = torch.sigmoid(lse - sinks[:, None].to(lse.dtype))
    return (out * share.unsqueeze(-1)).to(out.dtype)


# A graph break would materialize the scores, so it must be an error.
_compiled = torch.compile(_attend, dynamic=True, fullgraph=True)
