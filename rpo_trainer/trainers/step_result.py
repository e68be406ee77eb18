"""Terms of a loss, and the loss of a micro-batch from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.trainers.metrics import MetricSums


@dataclass
class Term:
    """A term of the loss: the sum of `numerators` over examples, divided by a count of the global batch.

    Attributes:
        numerators: `[B]`, with gradient if `coefficient` is not 0.
        per: the count to divide by: `examples`, `tokens` (trained tokens of the first responses) or
            `ratings`.
    """

    numerators: Tensor
    per: str
    coefficient: float = 1.0


@dataclass
class StepResult:
    """Terms of the loss by name, and additional metrics, each `[B]` in the order of the groups."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor]

    @property
    def gaps(self) -> dict[str, Tensor]:
        """`implicit_gap` and `target_gap`, `[B]` each, of preferences that have them."""
        names = {"implicit_gap": "rewards/margins", "target_gap": "rewards/target_gap"}
        return {gap: self.metrics[name] for gap, name in names.items() if name in self.metrics}

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the terms, by the names of their metrics."""
        return {f"loss/{name}": term.coefficient for name, term in self.terms.items()}

    def total(
        self, batch: PackedBatch, counts: Tensor, metrics: MetricSums, dtype: torch.dtype
    ) -> Tensor:
        """Return the loss of a micro-batch, a scalar, and add terms and metrics to `metrics`.

        Args:
            counts: `[2]`, counts of the global batch.
            dtype: dtype of the loss.
        """
        counts, weights = counts.clamp_min(1), batch.weights
        loss = torch.zeros((), dtype=dtype, device=weights.device)
        for name, term in self.terms.items():
            numerator = (term.numerators * weights).sum()
            position = 0 if term.per == "examples" else 1
            metrics.add_ratio(f"loss/{name}", numerator, batch.counts[position])
            if term.coefficient:
                loss = loss + term.coefficient * numerator / counts[position].to(numerator.dtype)
        for name, values in self.metrics.items():
            metrics.add(name, values, weights)
        return loss


@dataclass
class StepOutputs:
    """Outputs of `compute_loss` besides the loss of a micro-batch.

    Attributes:
        per_response: outputs of the model, without gradient: `[R]` summed log-probs, or `[R, A]` scores of a
            reward model.
        gaps: `implicit_gap` and `target_gap` of each example, `[B]`, of preferences.
    """

    per_response: Tensor
    gaps: dict[str, Tensor]
