"""What stops a run before the optimizer moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rpo_trainer.distributed import merge, rank
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
    """The one host sync of an optimizer step: is every loss of it finite, and the gradient?

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
    # Losses that are not finite, and gradients: the one time in a step that the host waits.
    wrong = torch.stack([(~finite).sum(), _not_finite(grad_norm, finite.device)])
    wrong_losses, wrong_norms = reduce(wrong.double()).tolist()
    if not wrong_losses and not wrong_norms:
        return
    loss_finite = not wrong_losses
    own = [
        row
        for ok, (_, ids) in zip(finite.tolist(), losses, strict=True)
        if loss_finite or not ok
        for row in ids
    ]
    rows = [row for _, part in sorted(merge({rank(): own}).items()) for row in part]
    shown = ", ".join(rows[:_ROWS_SHOWN]) + (" …" if len(rows) > _ROWS_SHOWN else "")
    raise NonFiniteError(
        f"the {'gradient' if loss_finite else 'loss'} is not finite at step {step}",
        where=f"rows {shown}",
        why="the optimizer has not moved; the last checkpoint is good",
        fix="look at these rows; lower learning_rate or beta, or use bfloat16 in place of float16",
    )


def _not_finite(value: Tensor | float, device: torch.device) -> Tensor:
    """0 or 1, on the device, without waiting for it."""
    if not isinstance(value, Tensor):  # DeepSpeed hands over a number
        return torch.full((), int(not math.isfinite(value)), device=device)
    whole: Any = getattr(value, "full_tensor", lambda: value)()  # FSDP2's is a DTensor
    norm: Tensor = whole
    return norm.to(device, non_blocking=True).isfinite().logical_not().long()
