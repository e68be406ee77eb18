"""What a stage notes down while it trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rpo_trainer.stages.record import StepZeroRecord

logger = logging.getLogger(__name__)


class MetricsLog(TrainerCallback):
    """Every log line of a stage as one JSON line."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")


class EvaluateBefore(TrainerCallback):
    """Evaluates the held-out examples before the first step, the model ready to be trained."""

    def __init__(self, trainer: Any, note: Callable[[dict[str, Any]], None]) -> None:
        self.trainer = trainer
        self.note = note

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.note(self.trainer.evaluate())


class StepZeroLog(TrainerCallback):
    """Hands on what the step-0 check measured, as soon as it is known: a resumed stage has none."""

    def __init__(self, trainer: Any, note: Callable[[StepZeroRecord], None]) -> None:
        self.trainer = trainer
        self.note = note

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = getattr(self.trainer, "step_zero", None)
        if values is not None and state.global_step == 1:
            self.note(StepZeroRecord(**values, ok=True))
