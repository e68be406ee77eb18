"""Disk space: what a run writes, whether it fits, and file system errors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpo_trainer.errors import ModelError, RecipeError, RunError
from rpo_trainer.models.adapter_files import base_of, is_adapter
from rpo_trainer.models.adapters import with_adapter
from rpo_trainer.models.from_config import auto_class
from rpo_trainer.models.multimodal import freeze_towers, random_model
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.plan.memory import optimizer_bytes
from rpo_trainer.recipe import RewardStage, Stage
from rpo_trainer.report.formatting import size
from rpo_trainer.runtime.file_errors import UNREADABLE, reading
from rpo_trainer.runtime.files import refusal
from rpo_trainer.stages.output_dtype import (
    EXACT,
    exact_until,
    most_exact,
    needs_exact,
    output_dtype,
    saves_full_model,
)
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.settings import lora_config

SAVING = "saving"  # the part that exists only while something is saved
_CELL = 60  # bytes of one reference log-prob in the cache, its key and file overhead included


def stage_disk(
    preparer: StagePreparer,
    stage: Stage,
    *,
    parameters: int,
    trained: int,
    optimizer: int,
    responses: int,
) -> dict[str, int]:
    """Return the bytes that a stage keeps, by kind, and `saving`: temporary bytes while it saves.

    Args:
        parameters, trained, optimizer: bytes of all weights in float32, of the trained ones, of their state.
        responses: number of responses whose reference log-probs are kept.
    """
    spec = stage.peft
    dtype = output_dtype(preparer, stage)
    delivered = parameters * dtype.itemsize // 4
    parts = {"output": delivered}
    full_model = saves_full_model(stage) or (spec is not None and bool(spec.merge))
    if spec is not None:
        parts["output"] = trained + (delivered if full_model else 0)
    if needs_exact(preparer, stage):
        parts[EXACT] = parameters
    if stage.save_steps:
        parts[SAVING] = (parameters if spec is None else trained) + optimizer
        parts["checkpoints"] = parts[SAVING] * stage.save_total_limit
    if full_model and dtype != torch.float32 and EXACT not in parts:  # the copy that is cast
        parts[SAVING] = max(parts.get(SAVING, 0), parameters)
    if stage.needs_reference:
        parts["reference cache"] = responses * _CELL
    return parts


def together(stages: Mapping[str, Mapping[str, int]], until: Mapping[str, str]) -> int:
    """Return the peak bytes of several stages.

    One stage writes a checkpoint at a time, and exact weights are removed when no stage will read them.

    Args:
        stages: `stage_disk` of each, in order, by name.
        until: see `exact_until`.
    """
    momentary = (SAVING, EXACT)
    permanent = sum(
        n for parts in stages.values() for name, n in parts.items() if name not in momentary
    )
    exact = most_exact([(name, parts.get(EXACT, 0)) for name, parts in stages.items()], until)
    return permanent + exact + max((parts.get(SAVING, 0) for parts in stages.values()), default=0)


def unread_model(preparer: StagePreparer, stage: Stage, dtype: torch.dtype) -> nn.Module:
    """Create the model that a stage trains, adapter included, without values.

    Call it under `torch.device("meta")`.

    Raises:
        ModelError: there is no configuration, or no causal language model can be created from it.
    """
    recipe, source = preparer.recipe, stage.init
    by_name = {other.name: other for other in preparer.stages}
    while source in by_name:
        source = by_name[source].init
    if source != "model" and is_adapter(folder := preparer.path(source)):
        source = base_of(folder)
    where = f"stages.{stage.name}.init"
    config = preparer.model_config(None if source == "model" else source)
    with reading("the model's configuration", where):
        factory: Any = auto_class(config, reward=stage.trains_reward_model, where=where)
    try:
        model: nn.Module = random_model(
            factory, config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
        )
    except (RuntimeError, *UNREADABLE) as error:  # on `meta`: not memory, and not a device
        raise ModelError(
            f"no model can be created from its configuration: {error}",
            code="model.bad-config",
            where="model",
            why="its fields conflict with each other",
            fix="correct them, or use a causal language model that transformers supports",
        ) from error
    if isinstance(stage, RewardStage):
        names, weights = stage.attributes, stage.reward_weights
        model = as_reward_model(model, attributes=names, weights=weights)
    freeze_towers(model)
    adapter = lora_config(stage)
    try:
        return model if adapter is None else with_adapter(model, adapter)
    except ModelError as error:
        raise error.at(f"stages.{stage.name}.peft") from error


def check_disk(
    preparer: StagePreparer, run_dir: Path, wanted: Sequence[Stage], responses: Mapping[str, int]
) -> None:
    """Raise RunError if the remaining stages need more disk space than is free.

    Args:
        wanted: the stages to run; what they have already written is subtracted.
        responses: number of responses of each stage by name, if known.
    """
    needs = {stage.name: _of_stage(preparer, stage, responses) for stage in wanted}
    there = sum(_size(run_dir / name) for name in needs)
    needed = together(needs, exact_until(preparer)) - there
    free = shutil.disk_usage(existing(run_dir)).free
    if needed <= free:
        return
    largest = sorted(needs, key=lambda name: -sum(needs[name].values()))[:3]
    raise RunError(
        f"the run needs about {size(needed)} of disk space, but only {size(free)} is free",
        code="run.disk-full",
        where=str(run_dir),
        why="it would stop while saving; the largest stages are "
        + ", ".join(f"{name} ({_parts(needs[name])})" for name in largest),
        fix="free disk space, lower save_total_limit, or use a --run-dir on another disk",
    )


def _of_stage(
    preparer: StagePreparer, stage: Stage, responses: Mapping[str, int]
) -> dict[str, int]:
    with torch.device("meta"):
        model = unread_model(preparer, stage, torch.float32)
    return stage_disk(
        preparer,
        stage,
        parameters=_held(model.parameters()),
        trained=_held(p for p in model.parameters() if p.requires_grad),
        optimizer=_state(model, stage) if stage.save_steps else 0,
        responses=responses.get(stage.name, 0),
    )


def _held(weights: Any) -> int:
    return sum(weight.numel() * 4 for weight in weights)  # float32, regardless of the compute dtype


def _state(model: nn.Module, stage: Stage) -> int:
    try:
        return optimizer_bytes(model, stage.optim)
    except RecipeError:  # a library is not installed: not counted
        return 0


def raise_if_refused(error: Exception, run_dir: Path) -> None:
    """Raise RunError if an error comes from the file system: a full disk, missing permissions."""
    message = refusal(error)
    if message is not None:
        raise RunError(
            f"file system error: {message}",
            code="run.file-system",
            where=str(getattr(error, "filename", None) or run_dir),
            why="finished stages and complete checkpoints are kept",
            fix="free disk space or fix the permissions, then run the same command to resume",
        ) from error


def existing(path: Path) -> Path:
    """Return the path, or its nearest existing parent."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
