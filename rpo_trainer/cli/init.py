"""`rpo-trainer init`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rpo_trainer.cli.arguments import show
from rpo_trainer.cli.convert import refuse_existing


@click.command()
@click.argument("recipe", default="recipe.yaml", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="NAME_OR_DIR", help="Model: directory or hub name.")
@click.option(
    "--data", required=True, multiple=True, metavar="FILE",
    help="Training rows: file or hub name. Can be repeated.",
)  # fmt: skip
@click.option(
    "--eval", "held_out", multiple=True, metavar="FILE",
    help="Held-out rows: file or hub name. Can be repeated.  [default: 5% of the prompts of --data]",
)  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["sft", "dpo", "rpo", "chain"]),
    help="Stages of the recipe.  [default: detected from the rows: conversations → sft, pairs → dpo, pairs "
    "with rewards → rpo, conversations and pairs → chain]",
)  # fmt: skip
@click.option("--lora", is_flag=True, help="Train a LoRA adapter instead of all weights.")
@click.option("--overwrite", is_flag=True, help="Replace RECIPE if it exists.")
def init(
    recipe: Path, model: str, data: Sequence[str], held_out: Sequence[str], kind: Any, lora: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """Write a recipe for a model and data files, ready to run.

    RECIPE is the file to write (default: recipe.yaml). The data determine the kind of training and, if the
    model is a local directory, `max_length`. The other values are starting points, each with a comment.
    """
    refuse_existing(recipe, overwrite)
    from rpo_trainer.runtime.files import atomic_write
    from rpo_trainer.stages.new_recipe import new_recipe

    draft = new_recipe(recipe, model=model, data=data, held_out=held_out, kind=kind, lora=lora)
    atomic_write(recipe, draft.text)
    for line in draft.facts:
        show(line)
    click.echo(f"wrote {recipe}; next:")
    for command in ("check", "plan", "run"):
        click.echo(f"  rpo-trainer {command} {recipe}")
