"""What a command selects: where a recipe runs, and which of its stages."""

from __future__ import annotations

from pathlib import Path

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import LoadedRecipe, expand_stages


def default_run_dir(loaded: LoadedRecipe) -> Path:
    """`run_dir` of the recipe, else `runs/` and the recipe's folder or file name."""
    if loaded.recipe.run_dir is not None:
        return Path(loaded.recipe.run_dir).expanduser()
    name = loaded.path.stem if loaded.path.stem != "chain" else loaded.base_dir.name
    return Path("runs") / name


def select_stage(loaded: LoadedRecipe, kind: str, name: str | None) -> str:
    """The stage that `rpo-trainer sft | dpo | rpo | reward` means.

    Raises:
        RecipeError: there is none, or several and no name.
    """
    stages = [stage for stage in expand_stages(loaded.recipe) if stage.kind == kind]
    names = [stage.name for stage in stages]
    if not names:
        there = ", ".join(dict.fromkeys(stage.kind for stage in expand_stages(loaded.recipe)))
        raise RecipeError(
            f"the recipe has no {kind} stage",
            code="option.no-stage-of-kind",
            where=str(loaded.path),
            why="there is nothing for this command to run",
            fix=f"it has stages of {there}; `rpo-trainer run` runs all of them",
        )
    if name is not None and name not in names:
        raise RecipeError(
            f"there is no {kind} stage {name!r}",
            code="option.unknown-stage",
            where=str(loaded.path),
            why="which of them is meant cannot be guessed",
            fix=f"one of: {', '.join(names)}",
        )
    if name is None and len(names) > 1:
        raise RecipeError(
            f"the recipe has {len(names)} {kind} stages",
            code="option.ambiguous-stage",
            where=str(loaded.path),
            why="which of them is meant cannot be guessed",
            fix=f"choose with --stage: {', '.join(names)}",
        )
    return name or names[0]
