"""`status --watch`: show the state of a run until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rpo_trainer.runtime.lock_holder import is_running

if TYPE_CHECKING:
    from rpo_trainer.report.collect import RunResults, StageResults


def watch(run_dir: Path, interval: float) -> None:
    """Show the table of `status` until the run ends; outside a terminal, print a line per change.

    Args:
        interval: seconds between refreshes.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    from rich.console import Console

    console = Console()
    try:
        if console.is_terminal:
            _in_terminal(console, run_dir, interval)
        else:
            _as_lines(run_dir, interval)
    except KeyboardInterrupt:  # stops watching, not the run
        return


def _readings(run_dir: Path, interval: float) -> Iterator[RunResults]:
    """Yield the run every `interval` seconds, at least once, until it ends."""
    from rpo_trainer.report.collect import collect_run

    while True:
        running = is_running(run_dir)  # before reading: so that the last lines are not missed
        run = collect_run(run_dir)
        yield run
        if run.finished or not running:
            return
        time.sleep(interval)


def _in_terminal(console: Any, run_dir: Path, interval: float) -> None:
    from rich.live import Live

    from rpo_trainer.report import status_view

    end = ""
    with Live(console=console, auto_refresh=False) as live:
        for run in _readings(run_dir, interval):
            live.update(status_view(run), refresh=True)
            end = _end(run)
    click.echo(end)


def _as_lines(run_dir: Path, interval: float) -> None:
    shown: dict[str, str] = {}
    end = ""
    for run in _readings(run_dir, interval):
        for stage in run.stages:
            line = _line(stage)
            if shown.get(stage.name) != line:
                shown[stage.name] = line
                click.echo(f"{time.strftime('%H:%M:%S')}  {line}")
        end = _end(run)
    click.echo(end)


def _line(stage: StageResults) -> str:
    """Return a line with the state, the last step and the loss of a stage."""
    from rpo_trainer.report.formatting import duration, short

    parts: list[str] = [stage.record.state]
    row = next((row for row in reversed(stage.metrics) if "loss" in row and "step" in row), None)
    if row is not None:
        parts += [f"step {row['step']}", f"loss {short(float(row['loss']), 4)}"]
    if stage.record.state == "done":
        parts.append(duration(stage.record.seconds))
    return f"{stage.name}: {', '.join(parts)}"


def _end(run: RunResults) -> str:
    if run.finished:
        return "finished"
    return "not running; to resume, repeat the `rpo-trainer run` command"
