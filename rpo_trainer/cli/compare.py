"""`rpo-trainer compare`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run_dirs", metavar="RUN RUN [RUN ...]", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--html",
    "target",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the comparison as an HTML page with overlaid curves (extra `report`).",
)
def compare(run_dirs: tuple[Path, ...], target: Path | None) -> None:
    """Compare the final results and the settings of runs.

    RUN is a run directory. Results are those after the last measured stage of each run, with 95%
    intervals over held-out prompts. Settings are the recipe fields, hardware and versions that differ.
    """
    if len(run_dirs) < 2:
        raise click.UsageError("At least two run directories are required.")
    from rich.console import Console

    from rpo_trainer.report import build_comparison, compare_view

    Console(highlight=False).print(compare_view(run_dirs))
    if target is not None:
        click.echo(f"comparison: {build_comparison(run_dirs, target)}")
