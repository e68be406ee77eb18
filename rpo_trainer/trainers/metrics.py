"""Sums on the device between two log lines; one reduction and one host sync for each line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class MetricSums:
    """Means over everything added since the last `drain`, whatever micro-batch or rank it came from."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Adds values, each counting as its weight says; the mean is Σ value·weight / Σ weight."""
        values, weights = values.detach().double(), weights.detach().double()
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        known = self._sums.get(name)
        self._sums[name] = pair if known is None else known + pair

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """Adds to a mean given as numerator and denominator."""
        pair = torch.stack([numerator.detach().double(), denominator.detach().double()])
        known = self._sums.get(name)
        self._sums[name] = pair if known is None else known + pair

    def copy(self) -> MetricSums:
        """The same sums, to go back to."""
        other = MetricSums()
        other._sums = dict(self._sums)
        return other

    def drain(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Means by name, and an empty start.

        Args:
            reduce: sums a `[M, 2]` tensor over the ranks.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names]))
        self._sums = {}
        return {
            name: total / weight
            for name, (total, weight) in zip(names, sums.tolist(), strict=True)
            if weight > 0
        }
