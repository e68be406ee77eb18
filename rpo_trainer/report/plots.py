"""Figures as inline SVG whose colours are CSS variables: one drawing serves light and dark pages.

Each figure is about as wide as a phone; the page's grid puts several side by side where it can.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rpo_trainer.report.collect import Curve, StageResults
from rpo_trainer.report.scores import Measure
from rpo_trainer.stages.record import GapRecord

# matplotlib draws with these stand-ins; in the page each becomes the variable of its name.
_COLOURS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--first",
    "#050505": "--second",
    "#060606": "--third",
}
_INK, _MUTED, _LINE, FIRST, SECOND, THIRD = _COLOURS

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "text.parse_math": False,  # a $ in a name is a $
    "axes.formatter.useoffset": False,
    "font.size": 9.0,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
_MANY_POINTS = 80  # from here on a running mean is drawn over the values
_MOST_DOTS = 800


@dataclass(frozen=True)
class Plot:
    """A figure for the page: key, title, SVG element, and a sentence for those who do not see it."""

    key: str
    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Line:
    """A named curve in one of the page's colours."""

    label: str
    curve: Curve
    colour: str


def stage_plots(stage: StageResults) -> list[Plot]:
    """The figures of one stage that there are values for."""
    if stage.kind == "reward":
        plots = _reward_plots(stage)
    else:
        plots = _preference_plots(stage) if stage.is_preference else _sft_plots(stage)
    return [plot for plot in plots if plot is not None]


def scores_plot(
    names: Sequence[str],
    sampled: Sequence[Measure | None],
    greedy: Sequence[Measure | None],
    what: str,
) -> Plot | None:
    """A score after each stage with its interval; None with fewer than two scored stages."""
    series = (("sampled", sampled, FIRST, -0.08), ("greedy", greedy, SECOND, 0.08))
    if not any(sum(found is not None for found in values) >= 2 for _, values, _, _ in series):
        return None

    def draw(axes: Axes) -> None:
        for label, values, colour, shift in series:
            points = [(place, found) for place, found in enumerate(values) if found is not None]
            if not points:
                continue
            xs, ys = [place + shift for place, _ in points], [found.value for _, found in points]
            below = [
                found.value - (found.value if found.low is None else found.low)
                for _, found in points
            ]
            above = [
                (found.value if found.high is None else found.high) - found.value
                for _, found in points
            ]
            axes.errorbar(
                xs,
                ys,
                yerr=[below, above],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
        axes.set_xticks(range(len(names)), labels=list(names), rotation=30, ha="right")
        axes.set_xlim(-0.4, len(names) - 0.6)
        axes.grid(visible=False, axis="x")
        _legend_above(axes)

    return _plot(f"scores-{what}", what, draw, height=2.7)


def _reward_plots(stage: StageResults) -> list[Plot | None]:
    loss = Line("training", stage.curve("loss"), FIRST)
    held_out = Line("held out", stage.curve("eval_loss"), SECOND)
    right = [
        Line("training", stage.curve("accuracy"), FIRST),
        Line("held out", stage.curve("eval_accuracy"), SECOND),
    ]
    tables = stage.agreement.calibration.items()
    return [
        _lines(stage, "loss", "loss", [loss, held_out]),
        _lines(stage, "accuracy", "share of pairs in their order", right, bounds=(0.0, 1.0)),
        *(_calibration(stage, name, points) for name, points in tables),
        _learning_rate(stage),
    ]


def _calibration(stage: StageResults, name: str, points: list[tuple[float, float]]) -> Plot | None:
    """What was predicted against what it was, bin by bin; on the diagonal the two agree."""
    xs, ys = [x for x, _ in points], [y for _, y in points]

    def draw(axes: Axes) -> None:
        ends = min(xs + ys), max(xs + ys)
        axes.plot(ends, ends, color=_MUTED, linestyle=":", label="equal")
        axes.plot(xs, ys, color=FIRST, marker="o", markersize=4, label="held-out rows")
        axes.set_xlabel("predicted")
        axes.set_ylabel("share right" if name == "pairs" else "rated")
        _legend_above(axes)

    return _plot(f"{stage.name}-calibration-{name}", f"calibration: {name}", draw)


def _sft_plots(stage: StageResults) -> list[Plot | None]:
    loss = Line("training", stage.curve("loss"), FIRST)
    held_out = Line("held out", stage.curve("eval_loss"), SECOND)
    return [
        _lines(stage, "loss", "loss (NLL, nats)", [loss, held_out]),
        _lines(stage, "grad", "gradient norm", [Line("norm", stage.curve("grad_norm"), FIRST)]),
        _learning_rate(stage),
    ]


def _learning_rate(stage: StageResults) -> Plot | None:
    """The schedule, where there is one to see."""
    rate = stage.curve("learning_rate")
    if len(set(rate.values)) < 2:
        return None
    return _lines(stage, "rate", "learning rate", [Line("learning rate", rate, FIRST)])


def _preference_plots(stage: StageResults) -> list[Plot | None]:
    curve = stage.curve
    constant = stage.record.step0.expected if stage.record.step0 else None
    preference = curve("loss/preference") or curve("loss")
    sft = [Line("SFT term", curve("loss/sft"), SECOND)]
    gaps = [
        Line("implicit", curve("rewards/margins"), FIRST),
        Line("target", curve("rewards/target_gap"), SECOND),
    ]
    gap_title = "implicit and target gap" if gaps[1].curve else "implicit gap"
    moves = [
        Line("chosen", stage.delta("chosen"), FIRST),
        Line("rejected", stage.delta("rejected"), SECOND),
    ]
    shares = [
        Line("chosen wins", curve("rewards/accuracies"), FIRST),
        Line("chosen falling", curve("logps/chosen_falling"), SECOND),
    ]
    return [
        _lines(
            stage,
            "preference",
            "preference loss",
            [Line("preference", preference, FIRST)],
            level=constant,
            level_label="before the first update",
        ),
        _lines(stage, "sft", "SFT term", sft),
        _lines(stage, "gap", gap_title, gaps),
        _lines(
            stage,
            "logps",
            "log-prob against the reference, nats per response",
            moves,
            level=0.0,
            level_label="as the reference",
        ),
        _lines(stage, "shares", "share of examples", shares, bounds=(0.0, 1.0)),
        _learning_rate(stage),
        _scatter(stage),
        _histogram(stage),
        _sigma_histogram(stage),
    ]


def _lines(
    stage: StageResults,
    key: str,
    title: str,
    lines: list[Line],
    level: float | None = None,
    level_label: str = "",
    bounds: tuple[float, float] | None = None,
) -> Plot | None:
    """Curves over steps, and a dotted level line; None where every curve is empty."""
    shown = [line for line in lines if line.curve]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for line in shown:
            _draw_curve(axes, line)
        if level is not None:
            axes.axhline(level, color=_MUTED, linestyle=":", linewidth=1.2, label=level_label)
        if bounds:
            axes.set_ylim(bounds[0] - 0.03, bounds[1] + 0.03)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(shown) > 1 or level is not None:
            _legend_above(axes)

    ends = ", ".join(
        f"{line.label} from {line.curve.start():.3g} to {line.curve.end():.3g}" for line in shown
    )
    return _plot(f"{stage.name}-{key}", title, draw, alt=f"{title}: {ends}")


def _draw_curve(axes: Axes, line: Line) -> None:
    steps, values = line.curve.steps, line.curve.values
    if len(values) < _MANY_POINTS:
        marker = "o" if len(values) < 3 else None
        axes.plot(steps, values, color=line.colour, label=line.label, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=line.colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps, running_mean(values, len(values) // 25), color=line.colour, label=line.label)


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """The mean of each value and up to `half` neighbours on both sides, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        first, end = max(0, place - half), min(len(values), place + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def _scatter(stage: StageResults) -> Plot | None:
    gaps = [(gap.target_gap, gap.implicit_gap) for gap in _thin(stage.gaps)]
    pairs = [(target, implicit) for target, implicit in gaps if target is not None]
    if not pairs or stage.kind != "rpo":
        return None
    xs, ys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def draw(axes: Axes) -> None:
        low, high = max(min(xs), min(ys)), min(max(xs), max(ys))
        if low < high:
            axes.plot([low, high], [low, high], color=_MUTED, linestyle=":", label="equal")
        axes.scatter(xs, ys, s=9, color=FIRST, alpha=0.45, linewidths=0, label="an example")
        axes.set_xlabel("target gap")
        axes.set_ylabel("implicit gap")
        _legend_above(axes)

    return _plot(f"{stage.name}-scatter", "each example: implicit against target gap", draw)


def _histogram(stage: StageResults) -> Plot | None:
    series = [("implicit", [gap.implicit_gap for gap in stage.gaps], FIRST)]
    targets = [gap.target_gap for gap in stage.gaps if gap.target_gap is not None]
    if targets and stage.kind == "rpo":
        series.append(("target", targets, SECOND))
    return _bars(stage, "gaps", "gaps at the end", series, "gap")


def _sigma_histogram(stage: StageResults) -> Plot | None:
    targets = [gap.target_gap for gap in stage.gaps if gap.target_gap is not None]
    if stage.kind != "rpo":
        return None
    sigmas = [_sigma(target) for target in targets]
    return _bars(
        stage, "sigma", "σ(target gap): what RPO asks for", [("σ(target)", sigmas, SECOND)], "σ"
    )


def _bars(
    stage: StageResults, key: str, title: str, series: list[tuple[str, list[float], str]], unit: str
) -> Plot | None:
    values = [value for _, found, _ in series for value in found]
    if not values:
        return None
    low, high = min(values), max(values)
    bins = (
        [low + (high - low) * place / 24 for place in range(25)]
        if high > low
        else [low - 0.5, low + 0.5]
    )

    def draw(axes: Axes) -> None:
        for label, found, colour in series:
            axes.hist(found, bins=bins, color=colour, alpha=0.55, label=label)
        axes.set_xlabel(unit)
        axes.set_ylabel("examples")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(series) > 1:
            _legend_above(axes)

    return _plot(f"{stage.name}-{key}", title, draw)


def _thin(gaps: list[GapRecord]) -> list[GapRecord]:
    """At most `_MOST_DOTS` of them, evenly spaced, so that the page stays small."""
    return gaps[:: max(1, math.ceil(len(gaps) / _MOST_DOTS))]


def _sigma(value: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _legend_above(axes: Axes) -> None:
    """A one-line legend above the axes, where it covers no values."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, columnspacing=1.2, handlelength=1.4
    )


def _plot(
    key: str,
    title: str,
    draw: Callable[[Axes], object],
    alt: str | None = None,
    height: float = 2.4,
) -> Plot:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Plot(key, title, _inline(buffer.getvalue(), key), alt or title)


def _inline(svg: str, key: str) -> str:
    """The bare <svg> element: no fixed size, ids of its own, colours by CSS variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # An inline SVG needs no namespaces: HTML knows them, and the page then names no address at all.
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    safe = re.sub(r"[^A-Za-z0-9]+", "-", key)
    svg = re.sub(r'\bid="', f'id="{safe}-', svg)
    svg = svg.replace("url(#", f"url(#{safe}-").replace('href="#', f'href="#{safe}-')
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg.strip()
