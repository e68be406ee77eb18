"""Means of metrics between two log lines or over an evaluation, over all micro-batches and ranks.

Sums stay on the device; each log line takes one reduction and one host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rpo_trainer.runtime.devices import widest


class Metrics:
    """Sums for the log lines and evaluations of a trainer.

    Attributes:
        training: sums since the last log line.
        evaluation: sums since the start of the evaluation.
        coefficients: coefficients of the loss terms, by the names of their metrics.
    """

    def __init__(self) -> None:
        self.training = MetricSums()
        self.evaluation = MetricSums()
        self.coefficients: dict[str, float] = {}
        self._before_step = self.training, torch.zeros(())

    def keep(self, running_loss: Tensor) -> None:
        """Save the sums before a step: ours, and the running loss of transformers."""
        self._before_step = self.training.copy(), running_loss.clone()

    def undo_step(self, running_loss: Tensor) -> None:
        """Restore what `keep` has saved: a skipped step does not count."""
        self.training, before = self._before_step
        running_loss.copy_(before)

    def of_evaluation(
        self,
        reduce: Callable[[Tensor], Tensor],
        router: Mapping[str, float],
        prefix: str,
    ) -> dict[str, float]:
        """Return the means of an evaluation with prefix, and its loss.

        Args:
            reduce: see `MetricSums.drain`.
            router: the load-balancing loss, which is not a mean over examples; empty: none.
        """
        means = {**self.evaluation.drain(reduce), **router}
        loss = sum(coefficient * means[name] for name, coefficient in self.coefficients.items())
        return {
            **{f"{prefix}_{name}": value for name, value in means.items()},
            f"{prefix}_loss": loss,
        }


class MetricSums:
    """Weighted means over all values added since the last `drain`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add values with weights; the mean is Σ value·weight / Σ weight."""
        values, weights = widest(values.detach()), widest(weights.detach())
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        known = self._sums.get(name)
        self._sums[name] = pair if known is None else known + pair

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """Add to a mean given as numerator and denominator."""
        pair = torch.stack([widest(numerator.detach()), widest(denominator.detach())])
        known = self._sums.get(name)
        self._sums[name] = pair if known is None else known + pair

    def copy(self) -> MetricSums:
        """Return a copy of the sums."""
        other = MetricSums()
        other._sums = dict(self._sums)
        return other

    def drain(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the means by name, and reset the sums.

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
