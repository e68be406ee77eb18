"""The page: everything that was collected and judged, in one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rpo_trainer.report.audits import AuditView, read_audit
from rpo_trainer.report.collect import RunResults, StageResults, collect_run
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.formatting import duration, short, size
from rpo_trainer.report.plots import Plot, scores_plot, stage_plots
from rpo_trainer.report.scores import one_measure
from rpo_trainer.report.table import comparison
from rpo_trainer.report.verdict import Verdict, judge
from rpo_trainer.stages.record import AuditRecord, DataRecord, SampleRecord, StageRecord

_OPEN_SAMPLES = 4
_SETTINGS = {
    "loss_type": "loss",
    "beta": "β",
    "reward_scale": "η",
    "sft_loss_weight": "SFT weight",
    "learning_rate": "learning rate",
    "global_batch_size": "batch",
}


@dataclass(frozen=True)
class StageView:
    """What the page shows of a stage."""

    record: StageRecord
    anchor: str
    parent: str
    reference: str | None
    settings: list[tuple[str, str]]
    findings: list[Finding]
    plots: list[Plot]


@dataclass(frozen=True)
class Answer:
    """What the policy after one stage answers to a prompt."""

    stage: str
    sample: SampleRecord

    def right(self, text: str | None) -> bool:
        """Whether `text` is the known answer, but for spaces around it."""
        truth = self.sample.ground_truth
        return text is not None and truth is not None and text.strip() == truth.strip()


@dataclass(frozen=True)
class PromptView:
    """A fixed prompt and the answers after each stage, in the chain's order."""

    prompt: str
    ground_truth: str | None
    answers: list[Answer]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` (complete or not at all) and return its path.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    page = render(collect_run(run_dir))
    target = run_dir / "report.html"
    staged = target.with_suffix(".html.tmp")
    staged.write_text(
        page, encoding="utf-8", errors="replace"
    )  # a lone surrogate in a row is no reason to fail
    os.replace(staged, target)
    return target


def render(run: RunResults) -> str:
    """The page of a run, as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpo_trainer.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short, svg=_svg)
    verdict = judge(run)
    samples = _prompts(run)
    views = [_stage_view(run, stage, number, verdict) for number, stage in enumerate(run.stages, 1)]
    return environment.get_template("template.html.j2").render(
        run=run,
        verdict=verdict,
        columns=comparison(run),
        overview=_overview(run),
        stages=views,
        audits=[audit for stage in run.stages for audit in _audits(stage.record)],
        anchors={view.record.name: view.anchor for view in views},
        open_prompts=samples[:_OPEN_SAMPLES],
        more_prompts=samples[_OPEN_SAMPLES:],
        total_time=duration(sum(stage.record.seconds or 0.0 for stage in run.stages)),
        peak_memory=size(
            max((stage.record.peak_memory_bytes or 0 for stage in run.stages), default=0) or None
        ),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _audits(record: StageRecord) -> Iterator[tuple[str, AuditView]]:
    data = record.data or DataRecord()
    yield record.name, read_audit(data.audit)
    yield f"{record.name}, held out", read_audit(data.held_out or AuditRecord())


def _svg(plot: Plot) -> Markup:
    # Made by this package from numbers; labels that come from the user were escaped by matplotlib.
    return Markup(plot.svg)


def _stage_view(run: RunResults, stage: StageResults, number: int, verdict: Verdict) -> StageView:
    parent = run.parent(stage)
    return StageView(
        record=stage.record,
        anchor=f"stage-{number}",
        parent=parent.name if parent else _origin(stage.record.init),
        reference=_reference(stage, parent),
        settings=_settings(stage),
        findings=verdict.of_stage(stage.name),
        plots=stage_plots(stage),
    )


def _origin(init: str | None) -> str:
    return "the model" if init in (None, "previous", "model") else str(init)


def _reference(stage: StageResults, parent: StageResults | None) -> str | None:
    """The reference by the name of the stage that made it; None for stages without one."""
    if not stage.is_preference:
        return None
    record = stage.record
    if record.reference in (None, "init", "previous"):
        return parent.name if parent else _origin(record.init)
    return str(record.reference).removesuffix("/final")


def _settings(stage: StageResults) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)

    return [
        (label, text(stage.settings[key]))
        for key, label in _SETTINGS.items()
        if stage.settings.get(key) is not None
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


def _prompts(run: RunResults) -> list[PromptView]:
    """The prompts in the order they first appear, with the answers before the run and after every stage."""
    found: dict[str, PromptView] = {}
    for stage in run.compared:
        for sample in stage.samples:
            prompt = _prompt_text(sample.prompt)
            view = found.setdefault(prompt, PromptView(prompt, sample.ground_truth, []))
            view.answers.append(Answer(stage.name, sample))
    return list(found.values())


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text, of a conversation a line for each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in prompt)
