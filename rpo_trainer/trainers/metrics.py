"""Metrics between two log lines, and over an evaluation: means over all micro-batches and ranks.

The sums stay on the device; each log line costs one reduction and one host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rpo_trainer.runtime.devices import widest


class Metrics:
    """What a trainer's log lines and evaluations are made of.

    Attributes:
        training: sums since the last log line.
        evaluation: sums since the evaluation began.
        coefficients: of the terms of the loss, by the names of their metrics.
    """

    def __init__(self) -> None:
        self.training = MetricSums()
        self.evaluation = MetricSums()
        self.coefficients: dict[str, float] = {}
        self._before_step = self.training, torch.zeros(())

    def keep(self, running_loss: Tensor) -> None:
        """Notes the sums of training, and transformers' own of the loss, before a step."""
        self._before_step = self.training.copy(), running_loss.clone()

    def undo_step(self, running_loss: Tensor) -> None:
        """Puts back what `keep` has noted: a step that is left out counts in no mean."""
        self.training, before = self._before_step
        running_loss.copy_(before)

    def of_evaluation(
        self,
        reduce: Callable[[Tensor], Tensor],
        router: Mapping[str, float],
        prefix: str,
    ) -> dict[str, float]:
        """The means of an evaluation under their full names, and its loss.

        Args:
            reduce: see `MetricSums.drain`.
            router: the term of the routers, which is no mean over examples; empty: there is none.
        """
        means = {**self.evaluation.drain(reduce), **router}
        loss = sum(coefficient * means[name] for name, coefficient in self.coefficients.items())
        return {
            **{f"{prefix}_{name}": value for name, value in means.items()},
            f"{prefix}_loss": loss,
        }


class MetricSums:
    """Means over everything added since the last `drain`, whatever micro-batch or rank it came from."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Adds values, each counting as its weight says; the mean is Σ value·weight / Σ weight."""
        values, weights = widest(values.detach()), widest(weights.detach())
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        known = self._sums.get(name)
        self._sums[name] = pair if known is None else known + pair

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """Adds to a mean given as numerator and denominator."""
        pair = torch.stack([widest(numerator.detach()), widest(denominator.detach())])
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
