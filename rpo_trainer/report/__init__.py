"""Run directory → one HTML file, and a table for the terminal.

`build_report` needs the extra `report` (jinja2, matplotlib); `status_view` and `summary_table` do not.

collect       `RunResults`: records, metrics and samples of a run directory, damaged ones too
  scores        held-out figures, with intervals and names
verdict       for each stage in words: what it reached, and what to change where it did not
  findings      what verdicts are made of; findings about a preference stage
audits        what was read and dropped of a stage's data
table         the comparison of all stages, for terminal and page
plots         figures as inline SVG
html          the page
formatting    numbers as text
"""

from __future__ import annotations

from pathlib import Path

from rpo_trainer.errors import RunError
from rpo_trainer.report.table import status_view, summary_table

__all__ = ["build_report", "status_view", "summary_table"]


def build_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, finished or not, and return its path.

    Raises:
        RunError: `run_dir` is not a run directory, or the extra `report` is not installed.
    """
    try:
        from rpo_trainer.report.html import write_report
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("jinja2", "matplotlib"):
            raise
        raise RunError(
            f"the report needs {error.name}, which is not installed",
            code="report.missing-library",
            why="the page and its plots are drawn with it; training goes without",
            fix="pip install 'rpo-trainer[report]'",
        ) from error
    return write_report(run_dir)
