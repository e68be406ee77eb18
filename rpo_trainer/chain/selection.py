"""The run directory and the stage that a command works on."""

from __future__ import annotations

from pathlib import Path

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import LoadedRecipe, expand_stages


def default_run_dir(loaded: LoadedRecipe) -> Path:
    """Return the recipe's `run_dir`, else `runs/` plus the recipe's directory or file name."""
    if loaded.recipe.run_dir is not None:
        return Path(loaded.recipe.run_dir).expanduser()
    name = loaded.path.stem if loaded.path.stem != "chain" else loaded.base_dir.name
    return Path("runs") / name


def select_stage(loaded: LoadedRecipe, kind: str, name: str | None) -> str:
    """Return the name of the stage that `rpo-trainer sft | dpo | rpo | reward` runs.

    Raises:
        RecipeError: no such stage, or several and no name.
    """
    stages = [stage for stage in expand_stages(loaded.recipe) if stage.kind == kind]
    names = [stage.name for stage in stages]
    if not names:
        there = ", ".join(dict.fromkeys(stage.kind for stage in expand_stages(loaded.recipe)))
        raise RecipeError(
            f"the recipe has no {kind} stage",
            code="option.no-stage-of-kind",
            where=str(loaded.path),
            fix=f"its stages are of kind {there}; `rpo-trainer run` runs all of them",
        )
    if name is not None and name not in names:
        raise RecipeError(
            f"there is no {kind} stage {name!r}",
            code="option.unknown-stage",
            where=str(loaded.path),
            fix=f"give one of: {', '.join(names)}",
        )
    if name is None and len(names) > 1:
        raise RecipeError(
            f"the recipe has {len(names)} {kind} stages",
            code="option.ambiguous-stage",
            where=str(loaded.path),
            fix=f"choose one with --stage: {', '.join(names)}",
        )
    return name or names[0]
