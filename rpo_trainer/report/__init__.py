"""Reports of a run directory: one HTML page, a table for the terminal, and comparisons of runs.

`build_report` and `build_comparison` need the extra `report` (jinja2, matplotlib); `status_view`,
`summary_table` and `compare_view` do not.

collect        `RunResults`: records, metrics and samples of a run directory
  scores         held-out figures, with intervals and names
verdict        the headline, and the findings of each stage with what to change
  findings       `Finding`, and the findings about held-out figures and log-probs
audits         rows that were read and dropped
table          the table of all stages, for terminal and page
samples        the sample browser
system         hardware, versions, launcher, time and memory
plots          drawing of figures as inline SVG
  stage_plots    the figures of a stage
html           the page of a run
compare        runs side by side: figures and differing settings
  compare_page   the same as a page, with overlaid curves
paths          no absolute paths in what is sent
formatting     numbers as text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rpo_trainer.errors import RunError
from rpo_trainer.report.table import status_view, summary_table

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["build_comparison", "build_report", "compare_view", "status_view", "summary_table"]


def build_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path; the run may be unfinished.

    Raises:
        RunError: `run_dir` is not a run directory, or the extra `report` is not installed.
    """
    with _libraries():
        from rpo_trainer.report.html import write_report
    return write_report(run_dir)


def build_comparison(run_dirs: Sequence[Path], target: Path) -> Path:
    """Write the comparison of runs as an HTML file and return its path.

    Raises:
        RunError: a path is not a run directory or is given twice, or the extra `report` is not installed.
    """
    with _libraries():
        from rpo_trainer.report.compare_page import write_comparison
    from rpo_trainer.report.compare import compare_runs

    return write_comparison(compare_runs(run_dirs), target)


def compare_view(run_dirs: Sequence[Path]) -> Group:
    """Return the comparison of runs as tables for the terminal.

    Raises:
        RunError: a path is not a run directory or is given twice.
    """
    from rpo_trainer.report.compare import compare_runs, comparison_view

    return comparison_view(compare_runs(run_dirs))


@contextmanager
def _libraries() -> Iterator[None]:
    """Turn a missing library of the extra `report` into an error that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("jinja2", "matplotlib"):
            raise
        raise RunError(
            f"the report needs {error.name}, which is not installed",
            code="report.missing-library",
            fix="pip install 'rpo-trainer[report]'",
        ) from error
