"""The comparison of runs as one self-contained HTML file, with overlaid curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rpo_trainer.report.collect import Curve, StageResults
from rpo_trainer.report.compare import Comparison
from rpo_trainer.report.html import environment, now, write_page
from rpo_trainer.report.plots import FIRST, SECOND, THIRD, Line, Plot, line_plot

_COLORS = (FIRST, SECOND, THIRD)
_DASHES = ("-", "--", ":", "-.")  # a run has its own combination of color and line style


def write_comparison(comparison: Comparison, target: Path) -> Path:
    """Write the page atomically and return its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    page = environment(target.parent).get_template("compare.html.j2").render(
        title=f"Comparison: {', '.join(comparison.names)}",
        comparison=comparison,
        plots=overlays(comparison),
        written=now(),
    )  # fmt: skip
    return write_page(target, page)


def overlays(comparison: Comparison) -> list[Plot]:
    """Return the curves of each stage that at least two runs have, one figure per metric."""
    names = dict.fromkeys(stage.name for run in comparison.runs for stage in run.stages)
    plots = []
    for number, name in enumerate(names):
        stages = [run.stage(name) for run in comparison.runs]
        for metric, read in (("loss", _loss), ("implicit reward gap", _gap)):
            lines = _lines(comparison.names, stages, read)
            if len(lines) > 1:
                plots.append(line_plot(f"overlay-{number}-{metric}", f"{name}: {metric}", lines))
    return [plot for plot in plots if plot is not None]


def _loss(stage: StageResults) -> Curve:
    return stage.curve("loss/preference") or stage.curve("loss")


def _gap(stage: StageResults) -> Curve:
    return stage.curve("rewards/margins") if stage.is_preference else Curve([], [])


def _lines(
    names: list[str], stages: list[StageResults | None], read: Callable[[StageResults], Curve]
) -> list[Line]:
    found = []
    for place, (name, stage) in enumerate(zip(names, stages, strict=True)):
        if stage is not None and (curve := read(stage)):
            style = _DASHES[place // len(_COLORS) % len(_DASHES)]
            found.append(Line(name, curve, _COLORS[place % len(_COLORS)], style=style))
    return found
