"""Statistics of each token's distribution, which the head computes together with its log-prob, tile by tile.

They are metrics: nothing has a gradient through them.

Shapes: `N` tokens, `t` tokens of a tile, `w` vocabulary entries of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = -200.0  # e to this power is 0 in float32, and below the resolution of float64


class TokenStats:
    """The results of a forward pass for its tokens; None before it.

    Not a dataclass: FSDP copies those among the inputs of a model, and the results would be in the copy.

    Attributes:
        with_mean: whether `mean_logit` is computed.
        correct: `[N]` bool, whether the label has the largest logit.
        entropy: `[N]`, of the distribution, nats.
        mean_logit: `[N]`, mean of the logits over the vocabulary.
    """

    def __init__(self, with_mean: bool = False) -> None:
        self.with_mean = with_mean
        self.correct: Tensor | None = None
        self.entropy: Tensor | None = None
        self.mean_logit: Tensor | None = None
        self._running: Running | None = None

    def begin(self, tokens: int, dtype: torch.dtype, device: torch.device) -> Running:
        """Return the sums over the tiles that follow."""
        self._running = Running(tokens, dtype, device)
        return self._running

    def finish(self, normalizer: Tensor, target: Tensor, vocabulary: int) -> None:
        """Set the statistics, once all tiles are added.

        Args:
            normalizer: `[N]`, log of the sum of exponentials.
            target: `[N]`, logit of the label.
        """
        found, self._running = self._running, None
        assert found is not None  # `begin`
        self.correct = target >= found.top
        self.entropy = normalizer - found.expected
        self.mean_logit = found.total / vocabulary if self.with_mean else None

    def set_from_logits(self, logits: Tensor, labels: Tensor) -> None:
        """Set the statistics from the full logits, `[N, V]`."""
        x = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        part, total = slice_stats(x, with_mean=self.with_mean)
        running = self.begin(len(x), x.dtype, x.device)
        running.add(0, len(x), part, total.new_full(total.shape, float("-inf")), total, total)
        self.finish(total, x.gather(1, labels[:, None]).squeeze(1), x.shape[1])

    def set_joined(self, parts: list[TokenStats]) -> None:
        """Set the statistics of consecutive tokens."""
        for name in ("correct", "entropy", "mean_logit"):
            values = [getattr(part, name) for part in parts]
            setattr(self, name, None if None in values else torch.cat(values))


class SliceStats(NamedTuple):
    """Of a tile, `[t]` each: largest logit, mean under the tile's own softmax, and sum (or None)."""

    top: Tensor
    expected: Tensor
    total: Tensor | None


class Running:
    """Sums over slices of the vocabulary, `[N]` each: largest logit, mean under the softmax so far, sum."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.top = torch.full((tokens,), float("-inf"), dtype=dtype, device=device)
        self.expected = torch.zeros_like(self.top)
        self.total = torch.zeros_like(self.top)

    def add(
        self, t0: int, t1: int, part: SliceStats, before: Tensor, tile: Tensor, after: Tensor
    ) -> None:
        """Add a tile of the tokens `t0` to `t1`.

        Args:
            before, tile, after: `[t]`, log of the sum of exponentials of the slices before, of this one, and
                of all of them together.
        """
        old, new = ((x - after).exp().nan_to_num(0.0) for x in (before, tile))
        self.expected[t0:t1] = self.expected[t0:t1] * old + part.expected * new
        self.top[t0:t1] = torch.maximum(self.top[t0:t1], part.top)
        if part.total is not None:
            self.total[t0:t1] += part.total


def slice_stats(
    logits: Tensor, *, with_mean: bool, in_place: bool = False
) -> tuple[SliceStats, Tensor]:
    """Return the statistics of a tile, `[t, w]`, and the log of each row's sum of exponentials, `[t]`.

    With `in_place` it may overwrite the tile.
    """
    total = logits.sum(dim=1) if with_mean else None
    largest = logits.amax(dim=1)
    top = largest.clamp_min(torch.finfo(logits.dtype).min)  # a slice may be −inf throughout
    shifted = torch.sub(logits, top[:, None], out=logits if in_place else None)
    shifted.clamp_min_(_SMALLEST)  # 0 · −inf is NaN
    exponentials = shifted.exp()
    sums = exponentials.sum(dim=1)
    mean = torch.linalg.vecdot(exponentials, shifted).div_(sums).add_(top)
    real = largest > float("-inf")
    lse = torch.where(real | largest.isnan(), sums.log_().add_(top), largest)
    return SliceStats(largest, torch.where(real, mean, 0.0), total), lse
