"""The page: one self-contained HTML file with tables, findings, figures and samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rpo_trainer.report.audits import AuditView, read_audit
from rpo_trainer.report.collect import RunResults, StageResults, collect_run
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.formatting import short
from rpo_trainer.report.paths import without_absolute_paths
from rpo_trainer.report.plots import Plot, scores_plot
from rpo_trainer.report.samples import browse_samples
from rpo_trainer.report.scores import one_measure
from rpo_trainer.report.stage_plots import distribution_plots, stage_plots
from rpo_trainer.report.system import system_views, totals
from rpo_trainer.report.table import comparison
from rpo_trainer.report.verdict import Verdict, judge
from rpo_trainer.stages.record import AuditRecord, DataRecord, StageRecord

_SETTINGS = {
    "loss_type": "loss",
    "beta": "β",
    "reward_scale": "η",
    "sft_loss_weight": "SFT weight",
    "learning_rate": "learning rate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "global_batch_size": "batch",
}


@dataclass(frozen=True)
class StageView:
    """A stage as the page shows it."""

    record: StageRecord
    anchor: str
    parent: str
    reference: str | None
    settings: list[tuple[str, str]]
    findings: list[Finding]
    plots: list[Plot]
    distributions: list[Plot]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` atomically and return its path.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    return write_page(run_dir / "report.html", render(collect_run(run_dir), run_dir))


def write_page(target: Path, page: str) -> Path:
    """Write a page atomically and return its path."""
    staged = target.with_name(f"{target.name}.tmp")
    # A row may contain a lone surrogate, which UTF-8 cannot encode.
    staged.write_text(page, encoding="utf-8", errors="replace")
    os.replace(staged, target)
    return target


def render(run: RunResults, run_dir: Path) -> str:
    """Return the page of a run.

    Args:
        run_dir: the directory that paths are shown relative to.
    """
    verdict = judge(run)
    views = [_stage_view(run, stage, number, verdict) for number, stage in enumerate(run.stages, 1)]
    return environment(run_dir).get_template("page.html.j2").render(
        title=run.name,
        run=run,
        verdict=verdict,
        columns=comparison(run),
        overview=_overview(run),
        stages=views,
        audits=[audit for stage in run.stages for audit in _audits(stage.record)],
        anchors={view.record.name: view.anchor for view in views},
        browser=browse_samples(run),
        systems=system_views(run),
        totals=totals(run),
        written=now(),
    )  # fmt: skip


def environment(run_dir: Path) -> jinja2.Environment:
    """Return the templates, with the filters `short`, `svg` and `path` (without absolute paths)."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("rpo_trainer.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        short=short, svg=_svg, path=lambda text: without_absolute_paths(str(text), run_dir)
    )
    return templates


def now() -> str:
    """Return the current time, for the footer of a page."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _audits(record: StageRecord) -> Iterator[tuple[str, AuditView]]:
    data = record.data or DataRecord()
    yield record.name, read_audit(data.audit)
    yield f"{record.name}, held out", read_audit(data.held_out or AuditRecord())


def _svg(plot: Plot) -> Markup:
    # Drawn by this package; matplotlib escaped the labels, which may come from the user.
    return Markup(plot.svg)


def _stage_view(run: RunResults, stage: StageResults, number: int, verdict: Verdict) -> StageView:
    parent = run.parent(stage)
    return StageView(
        record=stage.record,
        anchor=f"stage-{number}",
        parent=parent.name if parent else _origin(stage.record.init),
        reference=_reference(stage, parent),
        settings=_settings(stage.settings),
        findings=verdict.of_stage(stage.name),
        plots=stage_plots(stage),
        distributions=distribution_plots(run, stage),
    )


def _origin(init: str | None) -> str:
    return "the model" if init in (None, "previous", "model") else str(init)


def _reference(stage: StageResults, parent: StageResults | None) -> str | None:
    """Name of the stage that the reference model comes from; None for stages without a reference."""
    if not stage.is_preference:
        return None
    record = stage.record
    if record.reference in (None, "init", "previous"):
        return parent.name if parent else _origin(record.init)
    return str(record.reference).removesuffix("/final")


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)

    # With max_steps, the number of epochs has no effect.
    unused = {"num_train_epochs"} if settings.get("max_steps") is not None else set()
    return [
        (label, text(settings[key]))
        for key, label in _SETTINGS.items()
        if settings.get(key) is not None and key not in unused
    ]


def _overview(run: RunResults) -> list[Plot]:
    scored = [stage for stage in run.compared if stage.scores.main() is not None]
    names, scores = [stage.name for stage in scored], [stage.scores for stage in scored]
    if not one_measure(scores):
        return []
    plots = (
        scores_plot(
            names,
            [score.reward_sampled for score in scores],
            [score.reward_greedy for score in scores],
            "mean reward on held-out prompts",
        ),
        scores_plot(
            names,
            [score.exact_sampled for score in scores],
            [score.exact_greedy for score in scores],
            "exact match on held-out prompts",
        ),
    )
    return [plot for plot in plots if plot is not None]
