"""The command `convert`: a config of another tool → a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rpo_trainer.errors import RunError


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="The recipe to write.  [default: FILE with the suffix .recipe.yaml]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the recipe if it exists.")
@click.option(
    "--devices", type=click.IntRange(1),
    help="Number of GPUs that FILE was used with, for the global batch size.  [default: 1]",
)  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["sft", "dpo", "reward"]), help="TRL only: the command FILE is for."
)
def convert(
    file: Path, output: Path | None, overwrite: bool, devices: int | None, kind: str | None
) -> None:
    """Convert FILE, a LLaMA-Factory, Axolotl or TRL config in YAML, to a recipe.

    Prints every key that has no counterpart, with the reason. Exit code 2 where the file or its training
    method is not supported.
    """
    from rpo_trainer.recipe.convert.convert import convert_file
    from rpo_trainer.runtime.files import atomic_write

    output = output or file.with_suffix(".recipe.yaml")
    refuse_existing(output, overwrite)
    converted = convert_file(file, output, devices=devices, kind=kind)
    atomic_write(output, converted.text)
    click.echo(f"wrote {output}, converted from {file} ({converted.tool})")
    _show("Not converted:", converted.left_out)
    _show("To compare before training:", converted.differences)
    _show("Not needed here:", converted.not_needed)
    click.echo(f"next: rpo-trainer check {output}")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise RunError where the file exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists",
            code="option.path-exists",
            fix="give --overwrite to replace it, or another name",
        )


def _show(title: str, notes: Sequence[object]) -> None:
    if notes:
        click.echo(title)
        for note in notes:
            click.echo(f"  {note}")
