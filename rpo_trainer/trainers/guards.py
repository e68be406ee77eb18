"""Guards against non-finite losses and gradients: stop the run, or skip the step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rpo_trainer.errors import NonFiniteError
from rpo_trainer.runtime.devices import widest
from rpo_trainer.runtime.distributed import all_gather_dict, rank

logger = logging.getLogger(__name__)

_ROWS_SHOWN = 8
_FILE = "skipped.json"


class BeforeUpdate(TrainerCallback):
    """Calls the guards when gradients are final, before the optimizer step."""

    def __init__(self, guards: Callable[[], object]) -> None:
        self.guards = guards

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guards()


class StepGuard:
    """Checks losses and gradient of each optimizer step before it is taken.

    Args:
        limit: maximum number of skipped steps of a run; 0: the first non-finite step stops it.

    Attributes:
        skipped: `step`, `what` and `rows` of each skipped step, including those before a resume.
        note: called with `skipped` after each skipped step, and when a run with skipped steps resumes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped: list[dict[str, Any]] = []
        self.note: Callable[[list[dict[str, Any]]], None] | None = None
        self._losses: list[tuple[Tensor, Sequence[str]]] = []
        self._steps = self._skipped_since_log = 0  # since the last log line

    def begin(self, checkpoint: str | None) -> None:
        """Start a run, or resume it from a checkpoint."""
        self._losses, self._steps, self._skipped_since_log = [], 0, 0
        path = Path(checkpoint or "") / _FILE
        self.skipped = json.loads(path.read_text()) if checkpoint and path.is_file() else []
        if self.skipped and self.note is not None:
            self.note(self.skipped)

    def write(self, checkpoint: Path) -> None:
        """Write the skipped steps to a checkpoint, for `begin`."""
        if self.skipped:
            (checkpoint / _FILE).write_text(json.dumps(self.skipped))

    def add(self, loss: Tensor, rows: Sequence[str]) -> None:
        """Add the loss of a micro-batch of the current step, and the ids of its rows."""
        self._losses.append((loss, rows))

    def check(
        self, grad_norm: Tensor | float, *, step: int, reduce: Callable[[Tensor], Tensor]
    ) -> bool:
        """Check that all losses and the gradient of a step are finite; the only host sync of a step.

        Args:
            grad_norm: norm of the gradient.
            step: the current optimizer step, from 1.
            reduce: sums a tensor over the ranks, so that all decide the same.

        Returns:
            Whether to take the step; False: skip it.

        Raises:
            NonFiniteError: with the rows; weights have not been updated.
        """
        losses, self._losses = self._losses, []
        self._steps += 1
        if not losses:
            return True
        finite = torch.stack([loss for loss, _ in losses]).isfinite()
        # Numbers of non-finite losses and gradients; `tolist` below is the only host sync.
        wrong = torch.stack([(~finite).sum(), _not_finite(grad_norm, finite.device)])
        wrong_losses, wrong_norms = reduce(widest(wrong)).tolist()
        if not wrong_losses and not wrong_norms:
            return True
        own = [
            row
            for ok, (_, ids) in zip(finite.tolist(), losses, strict=True)
            if not wrong_losses or not ok
            for row in ids
        ]
        rows = [row for _, part in sorted(all_gather_dict({rank(): own}).items()) for row in part]
        self._skip(step, "loss" if wrong_losses else "gradient", rows)
        return False

    def _skip(self, step: int, what: str, rows: list[str]) -> None:
        shown = ", ".join(rows[:_ROWS_SHOWN]) + (" …" if len(rows) > _ROWS_SHOWN else "")
        if len(self.skipped) >= self.limit:
            before = ", ".join(str(one["step"]) for one in self.skipped)
            allowed = f"max_skipped_steps is {self.limit}, and steps {before} were skipped before; "
            raise NonFiniteError(
                f"the {what} is not finite at step {step}",
                code="training.not-finite",
                details={
                    "what": what,
                    "step": step,
                    "rows": rows,
                    "skipped": [one["step"] for one in self.skipped],
                },
                where=f"rows {shown}",
                why=(allowed if self.skipped else "")
                + "weights have not been updated, and the last checkpoint is valid",
                fix="check these rows; lower learning_rate or beta, or use bfloat16 instead of float16",
            )
        self._skipped_since_log += 1
        self.skipped.append({"step": step, "what": what, "rows": rows})
        logger.warning(
            "the %s is not finite at step %d: step skipped, %d of at most %d (rows %s)",
            what, step, len(self.skipped), self.limit, shown,
        )  # fmt: skip
        if self.note is not None:
            self.note(self.skipped)

    def correct_log(self, logs: dict[str, float]) -> None:
        """Correct the means of a log line of transformers, which include skipped steps."""
        taken, all_steps = self._steps - self._skipped_since_log, self._steps
        if self._skipped_since_log:
            if taken:
                logs["loss"] *= all_steps / taken
            else:
                del logs["loss"]
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]
        if self.skipped:
            logs["nonfinite/skipped"] = len(self.skipped)
        self._steps = self._skipped_since_log = 0


def _not_finite(value: Tensor | float, device: torch.device) -> Tensor:
    """Return 0 or 1, on the device, without a sync."""
    if not isinstance(value, Tensor):  # a float from DeepSpeed
        return torch.full((), int(not math.isfinite(value)), device=device)
    whole: Any = getattr(value, "full_tensor", lambda: value)()  # FSDP2's is a DTensor
    norm: Tensor = whole
    return norm.to(device, non_blocking=True).isfinite().logical_not().long()
