"""Callbacks that record metrics and check results while a stage trains."""

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
    """Appends each log entry of a stage to a file, as one JSON line."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")


class EvaluateBefore(TrainerCallback):
    """Evaluates the held-out examples before the first step."""

    def __init__(self, trainer: Any, note: Callable[[dict[str, Any]], None]) -> None:
        self.trainer = trainer
        self.note = note

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.note(self.trainer.evaluate())


class StepZeroLog(TrainerCallback):
    """Reports the result of the step-0 check after the first step; a resumed stage has none."""

    def __init__(self, trainer: Any, note: Callable[[StepZeroRecord], None]) -> None:
        self.trainer = trainer
        self.note = note

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = getattr(self.trainer, "step_zero", None)
        if values is not None and state.global_step == 1:
            self.note(StepZeroRecord(**values, ok=True))
