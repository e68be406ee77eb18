"""Training one stage to its end, from its last checkpoint on."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rpo_trainer.chain.callbacks import EvaluateBefore, StepZeroLog
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.files import write_with_digest
from rpo_trainer.runtime.memory import peak_memory
from rpo_trainer.stages.record import (
    EvaluationRecord,
    SkippedStepRecord,
    StageRecord,
    WarningRecord,
)
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.checkpoint import checkpoints, last_complete
from rpo_trainer.trainers.early_warnings import EarlyWarnings

logger = logging.getLogger(__name__)

_GAPS_SHOWN = 512  # examples of the scatter in the report
_AGREEMENT = ("pearson/", "spearman/", "rmse/", "bias/", "calibration/")


def train_stage(
    trainer: BaseTrainer,
    folder: Path,
    *,
    begin: Callable[[int, bool], None],
    record: StageRecord,
    save: Callable[[], None],
) -> bool:
    """Trains, or resumes from the last complete checkpoint.

    Args:
        begin: called before training, with the step it starts from (-1: from nothing) and whether
            the held-out examples were already evaluated at that step.
        record: of the stage; what training finds out is written into it.
        save: writes the record to disk.

    Returns:
        Whether training has come to its end.
    """

    def note(**values: Any) -> None:
        for name, value in values.items():
            setattr(record, name, value)
        save()

    checkpoint = distributed.on_main(lambda: _resume_from(folder))
    if checkpoint is None:
        begin(-1, False)
    else:
        step = int(checkpoint.name.split("-")[1])
        logger.info("resuming from step %d", step)
        begin(step, _evaluation_at(step, _history(checkpoint)) is not None)
    held_out = trainer.eval_dataset is not None
    if held_out and checkpoint is None:
        evaluated = EvaluateBefore(trainer, lambda found: note(eval_before=_finite(found)))
        trainer.add_callback(evaluated)
    trainer.add_callback(StepZeroLog(trainer, lambda step0: note(step0=step0)))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyWarnings):
            callback.note = lambda found: note(
                warnings=[WarningRecord.from_json(one) for one in found]
            )
    trainer.step_guard.note = lambda skipped: note(
        skipped=[SkippedStepRecord.from_json(one) for one in skipped]
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        return False
    if held_out:
        # With eval_steps, the last step may have been evaluated within training; but the weights may
        # be those of an earlier one by now.
        reloaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint
        known = None if reloaded else _evaluation_at(state.global_step, state.log_history)
        record.eval_after = _finite(trainer.evaluate() if known is None else known)
    record.peak_memory_bytes = distributed.all_reduce_max(peak_memory())
    return True


def _resume_from(folder: Path) -> Path | None:
    found = last_complete(folder)
    for later in checkpoints(folder):
        if later == found:
            break
        shutil.rmtree(later)  # damaged: it must not outlive the good ones that are written now
    return found


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    history: list[dict[str, Any]] = state["log_history"]
    return history


def _evaluation_at(step: int, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The log line of the evaluation at a step, if there is one."""
    return next((e for e in history if e.get("step") == step and "eval_loss" in e), None)


def agreement_of(record: StageRecord) -> EvaluationRecord:
    """How a reward model agrees with its held-out rows: the metrics, and the tables of calibration."""
    after = {k.removeprefix("eval_"): v for k, v in (record.eval_after or {}).items()}
    return EvaluationRecord(
        accuracy=after.get("accuracy"),
        calibration=record.calibration or None,
        agreement={name: value for name, value in after.items() if name.startswith(_AGREEMENT)},
    )


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and math.isfinite(value)
    }


def write_gaps(trainer: BaseTrainer, path: Path) -> None:
    """Implicit and target gap of some training examples after the stage, one JSON line each."""
    examples = trainer.train_dataset
    rows = [examples[i] for i in range(min(len(examples), _GAPS_SHOWN))]
    size = trainer.args.per_device_train_batch_size
    lines: list[str] = []
    trainer.model.eval()
    for start in range(0, len(rows), size):
        batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
        with torch.no_grad(), trainer.accelerator.autocast():
            _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        for number, i in enumerate(batch.example_order):
            gaps = {name: float(values[number]) for name, values in outputs.gaps.items()}
            lines.append(json.dumps({"id": batch.ids[i], **gaps}) + "\n")
    trainer.metrics.evaluation.drain()
    if distributed.is_main():  # all have computed them: sharded weights need every process
        write_with_digest(path, "".join(lines))


@contextmanager
def light_collections() -> Iterator[None]:
    """What is there already is left out of Python's garbage collections inside.

    transformers, accelerate and the chain collect several times a stage, and each time a million objects
    of the libraries would be looked through: a tenth of the time where stages are short. Nothing is
    done where the process that calls has frozen its objects itself.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is frozen is not freed before the end
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
