"""`rpo-trainer convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rpo_trainer.cli.arguments import show
from rpo_trainer.errors import RunError


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="Recipe to write.  [default: FILE with the suffix .recipe.yaml]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the recipe if it exists.")
@click.option(
    "--devices", type=click.IntRange(1),
    help="Number of GPUs that FILE was used with, for the global batch size.  [default: 1]",
)  # fmt: skip
@click.option(
    "--kind",
    type=click.Choice(["sft", "dpo", "reward"]),
    help="TRL only: the TRL command of FILE, if its keys do not determine it.",
)
def convert(
    file: Path, output: Path | None, overwrite: bool, devices: int | None, kind: str | None
) -> None:
    """Convert a LLaMA-Factory, Axolotl or TRL config to a recipe.

    FILE is a YAML file. Prints every key without a counterpart, with the reason. Exit code 2 if the file
    or its training method is not supported.
    """
    from rpo_trainer.recipe.convert.convert import convert_file
    from rpo_trainer.runtime.files import atomic_write

    output = output or file.with_suffix(".recipe.yaml")
    refuse_existing(output, overwrite)
    converted = convert_file(file, output, devices=devices, kind=kind)
    atomic_write(output, converted.text)
    show(f"wrote {output}, converted from {file} ({converted.tool})")
    _notes("Not converted:", converted.left_out)
    _notes("Check before training:", converted.differences)
    _notes("Not needed:", converted.not_needed)
    click.echo(f"next: rpo-trainer check {output}")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise RunError if the file exists and must not be replaced."""
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists",
            code="option.path-exists",
            fix="give --overwrite to replace it, or choose another name",
        )


def _notes(title: str, notes: Sequence[object]) -> None:
    if notes:
        click.echo(title)
        for note in notes:
            show(f"  {note}")
