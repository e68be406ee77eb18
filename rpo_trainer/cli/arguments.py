"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

# Settings of a command that takes overrides.
OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Run directory.  [default: `run_dir` of the recipe, else runs/NAME]",
)
run_argument = click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
