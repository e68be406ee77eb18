"""Arguments, options and output that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rpo_trainer.runtime.terminal import fitted

# Settings of commands with overrides.
OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Run directory.  [default: `run_dir` of the recipe, else runs/NAME]",
)
run_argument = click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))


def show(text: str) -> None:
    """Print a line to stdout, wrapped at words in a terminal."""
    click.echo(fitted(text, sys.stdout))
