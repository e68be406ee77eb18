"""The output of a stage in `final`, and the exact float32 weights that later stages start from."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from rpo_trainer.chain.state import ChainState
from rpo_trainer.models.adapter_files import is_adapter
from rpo_trainer.models.delivered import copy_in_dtype
from rpo_trainer.models.dtypes import dtype_name, kept_in_float32
from rpo_trainer.models.weight_files import stored_dtype
from rpo_trainer.runtime import distributed
from rpo_trainer.stages.output_dtype import EXACT, exact_is_needed
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.record import OutputRecord
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.checkpoint import commit
from rpo_trainer.trainers.manifest import digests_in


def write_output(
    trainer: BaseTrainer, folder: Path, dtype: torch.dtype, *, keep_exact: bool
) -> None:
    """Write `final` of a stage that trains all weights: model and tokenizer, complete or absent.

    Args:
        dtype, keep_exact: see `commit_output`.
    """
    staged = folder / ".final"
    distributed.on_main(lambda: shutil.rmtree(staged, ignore_errors=True))
    trainer.save_model(str(staged))
    float32_names = kept_in_float32(trainer.model, dtype)
    commit_output(staged, folder, dtype, keep_exact=keep_exact, float32_names=float32_names)


def commit_output(
    staged: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    keep_exact: bool,
    float32_names: re.Pattern[str] | None,
) -> None:
    """Turn a saved model into `final` of a stage, in the dtype of its output; called on all ranks.

    Args:
        staged: the exact model, in float32; it is moved.
        folder: of the stage.
        dtype: what `final` is saved in.
        keep_exact: move the exact model to `exact` if `final` is rounded; it is there before `final` is.
        float32_names: see `copy_in_dtype`.
    """
    exact, delivered = folder / EXACT, folder / ".delivered"

    def rounded() -> bool:
        shutil.rmtree(exact, ignore_errors=True)
        return dtype != torch.float32 and copy_in_dtype(staged, delivered, dtype, float32_names)

    is_rounded = distributed.on_main(rounded)
    if is_rounded and keep_exact:
        commit(staged, exact, distributed.ALL_RANKS)
    elif is_rounded:
        distributed.on_main(lambda: shutil.rmtree(staged))
    commit(delivered if is_rounded else staged, folder / "final", distributed.ALL_RANKS)


def cast_output(folder: Path, dtype: torch.dtype, float32_names: re.Pattern[str] | None) -> None:
    """Cast a saved model to `dtype` in place; see `copy_in_dtype`."""
    copied = folder.with_name(".delivered")
    if dtype != torch.float32 and copy_in_dtype(folder, copied, dtype, float32_names):
        shutil.rmtree(folder)
        os.replace(copied, folder)


def output_fingerprint(final: Path) -> str:
    """Return a short content key of a stage's output, computed from the hashes of its weights."""
    weights = [d for name, d in digests_in(final).items() if name.endswith(".safetensors")]
    return "+".join(digest[:16] for digest in weights)


def output_record(final: Path) -> OutputRecord:
    """Return the entry of an output in chain.json."""
    exact = final.with_name(EXACT)
    dtype = torch.float32 if is_adapter(final) else stored_dtype(final)
    return OutputRecord(
        output_fingerprint(final),
        dtype=None if dtype is None else dtype_name(dtype),
        exact=output_fingerprint(exact) if exact.is_dir() else None,
    )


def remove_exact(preparer: StagePreparer, state: ChainState, run_dir: Path) -> None:
    """Remove exact weights that no stage will start from; `final` is kept."""
    done = {record.name for record in state.stages if record.state == "done"}
    for name in done:
        exact = run_dir / name / EXACT
        if exact.is_dir() and not exact_is_needed(preparer, name, done):
            shutil.rmtree(exact)
