"""Trains one stage, from its last checkpoint, and writes its output."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rpo_trainer.chain.callbacks import EvaluateBefore, StepZeroLog
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.files import write_with_digest
from rpo_trainer.runtime.harmless_lines import tied_keys_hidden
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

_GAPS_SHOWN = 512  # examples of the scatter in the report
_AGREEMENT = ("pearson/", "spearman/", "rmse/", "bias/", "calibration/")


def train_stage(
    trainer: BaseTrainer,
    folder: Path,
    *,
    begin: Callable[[int, bool], None],
    record: StageRecord,
    save: Callable[[], None],
    verify: bool = False,
) -> bool:
    """Train the stage, or resume from its last complete checkpoint.

    Args:
        begin: called before training with the step it starts from (-1: no checkpoint) and whether the
            held-out examples were already evaluated at that step.
        record: the stage's record, updated during training.
        save: writes the record to disk.
        verify: read the content of the checkpoints (`verify_manifest`).

    Returns:
        Whether training reached its last step.
    """

    def note(**values: Any) -> None:
        for name, value in values.items():
            setattr(record, name, value)
        save()

    checkpoint = distributed.on_main(lambda: _resume_from(folder, verify))
    if checkpoint is None:
        begin(-1, False)
    else:
        step = int(checkpoint.name.split("-")[1])
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
    with tied_keys_hidden(
        getattr(transformers_model(trainer.model), "all_tied_weights_keys", None) or ()
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        return False
    if held_out:
        # With eval_steps, the last step may have been evaluated already; but with
        # load_best_model_at_end the weights may be those of an earlier one.
        reloaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint
        known = None if reloaded else _evaluation_at(state.global_step, state.log_history)
        record.eval_after = _finite(trainer.evaluate() if known is None else known)
    record.peak_memory_bytes = distributed.all_reduce_max(peak_memory())
    return True


def _resume_from(folder: Path, verify: bool) -> Path | None:
    found = last_complete(folder, content=verify)
    for later in checkpoints(folder):
        if later == found:
            break
        shutil.rmtree(later)  # damaged: must not remain next to newer checkpoints
    return found


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    history: list[dict[str, Any]] = state["log_history"]
    return history


def _evaluation_at(step: int, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the log entry of the evaluation at a step, if any."""
    return next((e for e in history if e.get("step") == step and "eval_loss" in e), None)


def agreement_of(record: StageRecord) -> EvaluationRecord:
    """Return a reward model's agreement metrics and calibration tables on its held-out rows."""
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
    """Write the implicit and target reward gaps of some training examples, one JSON line each."""
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
    if distributed.is_main():  # every process computes them: sharded weights require it
        write_with_digest(path, "".join(lines))


@contextmanager
def light_collections() -> Iterator[None]:
    """Exclude the objects that exist already from garbage collection inside the context.

    transformers, accelerate and the chain collect several times per stage, and each time a million
    objects of the libraries would be traversed: a tenth of the time of short stages. Does nothing if the
    calling process has frozen its objects itself.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # frozen objects are not freed before the end
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
