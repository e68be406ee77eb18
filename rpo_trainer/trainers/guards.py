"""What stops a run before the optimizer moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rpo_trainer.errors import NonFiniteError

_ROWS_SHOWN = 8


class BeforeUpdate(TrainerCallback):
    """Calls the guards where transformers has gradients and has not moved yet."""

    def __init__(self, guards: Callable[[], None]) -> None:
        self.guards = guards

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guards()


def require_finite(
    losses: Sequence[tuple[Tensor, Sequence[str]]],
    grad_norm: Tensor | float,
    *,
    step: int,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """One host sync for each optimizer step: is every loss of it finite, and the gradient?

    Args:
        losses: of each micro-batch of this rank, with the ids of its rows.
        grad_norm: norm of the whole gradient.
        step: the optimizer step in hand, from 1.
        reduce: sums a tensor over the ranks, so that all stop if one does.

    Raises:
        NonFiniteError: with the rows; the optimizer has not moved.
    """
    if not losses:
        return
    finite = torch.stack([loss for loss, _ in losses]).isfinite()
    loss_finite = reduce((~finite).sum().double()).item() == 0
    if loss_finite and math.isfinite(float(grad_norm)):
        return
    rows = [
        row
        for ok, (_, ids) in zip(finite.tolist(), losses, strict=True)
        if loss_finite or not ok
        for row in ids
    ]
    shown = ", ".join(rows[:_ROWS_SHOWN]) + (" …" if len(rows) > _ROWS_SHOWN else "")
    raise NonFiniteError(
        f"the {'gradient' if loss_finite else 'loss'} is not finite at step {step}",
        where=f"rows {shown}" if rows else "another rank",
        why="the optimizer has not moved; the last checkpoint is good",
        fix="look at these rows; lower learning_rate or beta, or use bfloat16 in place of float16",
    )
