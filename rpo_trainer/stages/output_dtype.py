"""The dtype that a stage's output is saved in, and which later stages need its exact float32 weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rpo_trainer.models.adapter_files import base_of, is_adapter
from rpo_trainer.models.delivered import config_dtype
from rpo_trainer.models.weight_files import local_folder, stored_dtype
from rpo_trainer.recipe import Stage
from rpo_trainer.stages.inputs import sampling_spec
from rpo_trainer.stages.settings import frozen_dtype

if TYPE_CHECKING:
    from rpo_trainer.stages.prepare import StagePreparer

EXACT = "exact"  # the directory of the float32 weights, next to `final`
FOREVER = ""  # instead of the name of a last reader


def output_dtype(preparer: StagePreparer, stage: Stage) -> torch.dtype:
    """Return the dtype of the full model that a stage outputs.

    `auto` is the dtype of the model that its weights descend from: that of its configuration, or else of its
    files, or else float32.
    """
    if stage.save_dtype != "auto":
        dtype: torch.dtype = getattr(torch, stage.save_dtype)
        return dtype
    by_name = {other.name: other for other in preparer.stages}
    source = stage.init
    while source in by_name:
        source = by_name[source].init
    return _source_dtype(preparer, source)


def _source_dtype(preparer: StagePreparer, source: str) -> torch.dtype:
    if source != "model" and is_adapter(folder := preparer.path(source)):
        source = base_of(folder)
    name = preparer.recipe.model.name_or_path if source == "model" else source
    found = config_dtype(preparer.model_config(None if source == "model" else source))
    if found is None and name is not None:
        here = preparer.path(name)
        revision = preparer.recipe.model.revision
        place = here if here.is_dir() else local_folder(name, revision)
        found = stored_dtype(place) if place is not None else None
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def saves_full_model(stage: Stage) -> bool:
    """Whether `final` holds a full model, and not an adapter."""
    return stage.peft is None or stage.peft.between_stages == "merge"


def exact_readers(preparer: StagePreparer, name: str) -> list[Stage]:
    """Return the stages that train with the weights of a stage: as start, reference or sampled policy."""
    found = []
    for stage in preparer.stages:
        data = sampling_spec(stage.data, preparer.stages)
        policies = data.generate.policies if data.generate is not None else ()
        sampled = name in policies and stage.data.responses_from is None
        if name in stage.models_read.values() or sampled:
            found.append(stage)
    return found


def keeps_exact_base(preparer: StagePreparer, name: str) -> bool:
    """Whether an adapter is kept whose base is the exact output of a stage: `final` has other weights."""
    return any(
        stage.init == name
        and not saves_full_model(stage)
        and frozen_dtype(stage, preparer.recipe.model)
        != output_dtype(preparer, preparer.stage(name))
        for stage in preparer.stages
    )


def needs_exact(preparer: StagePreparer, stage: Stage) -> bool:
    """Whether a stage writes its exact weights next to its output."""
    if not saves_full_model(stage) or output_dtype(preparer, stage) == torch.float32:
        return False
    return bool(exact_readers(preparer, stage.name))


def exact_until(preparer: StagePreparer) -> dict[str, str]:
    """Return, by stage, the last stage that reads its exact weights; `FOREVER` if they are kept."""
    return {
        stage.name: FOREVER
        if keeps_exact_base(preparer, stage.name)
        else exact_readers(preparer, stage.name)[-1].name
        for stage in preparer.stages
        if needs_exact(preparer, stage)
    }


def exact_is_needed(preparer: StagePreparer, name: str, done: Collection[str]) -> bool:
    """Whether the exact weights of a finished stage will still be read.

    Args:
        done: names of the finished stages.
    """
    unfinished = any(reader.name not in done for reader in exact_readers(preparer, name))
    return unfinished or keeps_exact_base(preparer, name)


def training_folder(run_dir: Path, stage: str) -> Path:
    """Return the directory of a finished stage's exact weights: `exact`, or `final` if it has them."""
    exact = run_dir / stage / EXACT
    return exact if exact.is_dir() else run_dir / stage / "final"


def most_exact(sizes: Sequence[tuple[str, int]], until: Mapping[str, str]) -> int:
    """Return the largest number of bytes of exact weights that exist at one time.

    Args:
        sizes: of each stage in order, by name.
        until: see `exact_until`.
    """
    names = [name for name, _ in sizes]
    ends = {
        name: len(names) if until[name] not in names else names.index(until[name])
        for name in names
        if name in until
    }
    return max(
        (
            sum(size for i, (name, size) in enumerate(sizes) if i <= now <= ends.get(name, -1))
            for now in range(len(names))
        ),
        default=0,
    )
