"""The command `init`: a new recipe from a model and data files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rpo_trainer.cli.convert import refuse_existing


@click.command()
@click.argument("recipe", default="recipe.yaml", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, metavar="NAME_OR_DIR", help="Directory or hub name of the model."
)
@click.option(
    "--data", required=True, multiple=True, metavar="FILE",
    help="Training rows: a file or a hub name; may be repeated.",
)  # fmt: skip
@click.option(
    "--eval", "held_out", multiple=True, metavar="FILE", help="Held-out rows; may be repeated."
)
@click.option(
    "--kind", type=click.Choice(["sft", "dpo", "rpo", "chain"]),
    help="What to train.  [default: by the rows: conversations → sft, pairs → dpo, pairs with rewards → "
    "rpo, conversations and pairs → chain]",
)  # fmt: skip
@click.option("--lora", is_flag=True, help="Train a LoRA adapter instead of all weights.")
@click.option("--overwrite", is_flag=True, help="Replace RECIPE if it exists.")
def init(
    recipe: Path, model: str, data: Sequence[str], held_out: Sequence[str], kind: Any, lora: bool,
    overwrite: bool,
) -> None:  # fmt: skip
    """Write RECIPE (recipe.yaml) for a model and data files, ready to run.

    The rows decide the kind of training and the lengths; the other values are good starting points.
    """
    refuse_existing(recipe, overwrite)
    from rpo_trainer.runtime.files import atomic_write
    from rpo_trainer.stages.new_recipe import new_recipe

    made = new_recipe(recipe, model=model, data=data, held_out=held_out, kind=kind, lora=lora)
    atomic_write(recipe, made.text)
    for line in made.facts:
        click.echo(line)
    click.echo(f"wrote {recipe}; next:")
    for command in ("check", "plan", "run"):
        click.echo(f"  rpo-trainer {command} {recipe}")
