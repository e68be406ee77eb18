"""Drawing of figures as inline SVG. Colors are CSS variables, so that one figure serves light and dark pages.

A figure is about as wide as a phone; the grid of the page places several side by side.
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

from rpo_trainer.report.collect import Curve
from rpo_trainer.report.scores import Measure

# Placeholder colors: matplotlib draws with them, `_inline` replaces each by its CSS variable.
_COLORS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--first",
    "#050505": "--second",
    "#060606": "--third",
}
_INK, MUTED, _LINE, FIRST, SECOND, THIRD = _COLORS

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text, in the font of the page
    "text.parse_math": False,  # no TeX: a $ in a name is literal
    "axes.formatter.useoffset": False,
    "font.size": 9.0,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}
_MANY_POINTS = 80  # from this number on, a running mean is drawn over the values
_BINS = 24


@dataclass(frozen=True)
class Plot:
    """A figure of the page: key, title, SVG element and alternative text."""

    key: str
    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Line:
    """A labeled curve in one of the page's colors; `markers`: single measurements, not connected."""

    label: str
    curve: Curve
    color: str
    markers: bool = False
    style: str = "-"


def held_out(curve: Curve) -> Line:
    """Return a line of held-out values, measured at a few steps only."""
    return Line("held out", curve, SECOND, markers=True)


def scores_plot(
    names: Sequence[str],
    sampled: Sequence[Measure | None],
    greedy: Sequence[Measure | None],
    what: str,
) -> Plot | None:
    """Plot a score after each stage, with its interval; None with fewer than two scored stages."""
    series = (("sampled", sampled, FIRST, -0.08), ("greedy", greedy, SECOND, 0.08))
    if not any(sum(found is not None for found in values) >= 2 for _, values, _, _ in series):
        return None

    def draw(axes: Axes) -> None:
        for label, values, color, shift in series:
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
                color=color,
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
        axes.set_xticks(range(len(names)), labels=list(names), rotation=30, ha="right")
        axes.set_xlim(-0.4, len(names) - 0.6)
        axes.grid(visible=False, axis="x")
        legend_above(axes)

    return draw_plot(f"scores-{what}", what, draw, height=2.7)


def line_plot(
    key: str,
    title: str,
    lines: Sequence[Line],
    level: float | None = None,
    level_label: str = "",
    bounds: tuple[float, float] | None = None,
) -> Plot | None:
    """Plot curves over optimizer steps and a dotted line at `level`; None if all curves are empty."""
    shown = [line for line in lines if line.curve]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for line in shown:
            _draw_curve(axes, line)
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle=":", linewidth=1.2, label=level_label)
        if bounds:
            axes.set_ylim(bounds[0] - 0.03, bounds[1] + 0.03)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(shown) > 1 or level is not None:
            legend_above(axes)

    ends = ", ".join(
        f"{line.label} from {line.curve.start():.3g} to {line.curve.end():.3g}" for line in shown
    )
    return draw_plot(key, title, draw, alt=f"{title}: {ends}")


def _draw_curve(axes: Axes, line: Line) -> None:
    steps, values = line.curve.steps, line.curve.values
    if line.markers or len(values) < 3:
        axes.plot(
            steps, values, color=line.color, label=line.label, linestyle="none", marker="o",
            markersize=4.5, zorder=3, clip_on=False,
        )  # fmt: skip
        return
    if len(values) < _MANY_POINTS:
        axes.plot(steps, values, color=line.color, linestyle=line.style, label=line.label)
        return
    axes.plot(steps, values, color=line.color, linewidth=0.7, alpha=0.3)
    smooth = running_mean(values, len(values) // 25)
    axes.plot(steps, smooth, color=line.color, linestyle=line.style, label=line.label)


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Return the mean of each value and up to `half` neighbors on both sides, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        first, end = max(0, place - half), min(len(values), place + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def bars(
    key: str,
    title: str,
    series: Sequence[tuple[str, Sequence[float], str]],
    unit: str,
    *,
    counted: str,
    integers: bool = False,
) -> Plot | None:
    """Plot overlaid histograms with common bins; None without values.

    Args:
        series: (label, values, color).
        unit: label of the x axis.
        counted: what is counted: the label of the y axis.
        integers: the values are integers, so that the bins have integer widths.
    """
    values = [value for _, points, _ in series for value in points]
    if not values:
        return None
    bins = bin_edges(min(values), max(values), integers=integers)

    def draw(axes: Axes) -> None:
        for label, points, color in series:
            # A fraction of each series, so that series of different sizes compare.
            weights = [1 / len(points)] * len(points)
            axes.hist(points, bins=bins, weights=weights, color=color, alpha=0.5, label=label)
        axes.set_xlabel(unit)
        axes.set_ylabel(f"fraction of {counted}")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if len(series) > 1:
            legend_above(axes)

    means = ", ".join(
        f"{label}: mean {sum(points) / len(points):.3g}" for label, points, _ in series if points
    )
    return draw_plot(key, title, draw, alt=f"{title}. {means}")


def bin_edges(low: float, high: float, *, integers: bool) -> list[float]:
    """Return the bin edges of a histogram; with `integers`, bins of integer width around integers."""
    if low == high:
        return [low - 0.5, low + 0.5]
    if integers:
        width = max(1, math.ceil((high - low + 1) / _BINS))
        count = math.ceil((high - low + 1) / width)
        return [low - 0.5 + width * place for place in range(count + 1)]
    return [low + (high - low) * place / _BINS for place in range(_BINS + 1)]


def legend_above(axes: Axes) -> None:
    """Add a one-line legend above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, columnspacing=1.2, handlelength=1.4
    )


def draw_plot(
    key: str,
    title: str,
    draw: Callable[[Axes], object],
    alt: str | None = None,
    height: float = 2.4,
) -> Plot:
    """Draw a figure with `draw(axes)`; `alt` defaults to the title."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Plot(key, title, _inline(buffer.getvalue(), key), alt or title)


def _inline(svg: str, key: str) -> str:
    """Reduce to the <svg> element: no fixed size, unique ids, colors as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Inline SVG needs no namespaces; without them the page contains no URL.
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    safe = re.sub(r"[^A-Za-z0-9]+", "-", key)
    svg = re.sub(r'\bid="', f'id="{safe}-', svg)
    svg = svg.replace("url(#", f"url(#{safe}-").replace('href="#', f'href="#{safe}-')
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the entire page
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for stand_in, variable in _COLORS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg.strip()
