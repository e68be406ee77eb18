"""Figures of one stage: curves over training, gaps after it, and distributions over held-out responses."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from rpo_trainer.report.collect import RunResults, StageResults
from rpo_trainer.report.plots import (
    FIRST,
    MUTED,
    SECOND,
    THIRD,
    Line,
    Plot,
    bars,
    draw_plot,
    held_out,
    legend_above,
    line_plot,
)
from rpo_trainer.stages.record import GapRecord

_MOST_DOTS = 800


def stage_plots(stage: StageResults) -> list[Plot]:
    """Return the figures of a stage for which there are values."""
    if stage.kind == "reward":
        plots = _reward_plots(stage)
    else:
        plots = _preference_plots(stage) if stage.is_preference else _sft_plots(stage)
    return [plot for plot in plots if plot is not None]


def distribution_plots(run: RunResults, stage: StageResults) -> list[Plot]:
    """Return histograms of held-out responses after a stage, next to those before it.

    Rewards, lengths, and the log-ratio to the baseline, whose mean estimates the KL divergence.
    """
    before = run.seed(stage)
    if before is not None and not (before.samples and _same_prompts(before, stage)):
        before = None
    both = [("before", before, SECOND), ("after", stage, FIRST)]

    def series(values: str) -> list[tuple[str, list[float], str]]:
        found = [(label, _values(own, values), color) for label, own, color in both if own]
        return [(label, numbers, color) for label, numbers, color in found if numbers]

    rewards, tokens = series("rewards"), series("tokens")
    ratios = [
        (f"{label}: mean {sum(numbers) / len(numbers):.2f}", numbers, color)
        for label, numbers, color in series("log_ratios")
    ]
    drawn = (
        bars(
            f"{stage.name}-rewards", "rewards of held-out responses", rewards, "reward",
            counted="responses",
        ) if any(label == "after" for label, _, _ in rewards) else None,
        bars(
            f"{stage.name}-lengths", "lengths of held-out responses", tokens, "tokens",
            counted="responses", integers=True,
        ) if any(label == "after" for label, _, _ in tokens) else None,
        bars(
            f"{stage.name}-kl", f"KL from {stage.scores.baseline}, per response", ratios,
            "log-ratio, nats (mean = KL)", counted="responses",
        ),
    )  # fmt: skip
    return [plot for plot in drawn if plot is not None]


def _same_prompts(one: StageResults, other: StageResults) -> bool:
    return [sample.prompt for sample in one.samples] == [sample.prompt for sample in other.samples]


def _values(stage: StageResults, name: str) -> list[float]:
    """Return a figure of all sampled responses of `samples.jsonl`, without missing values."""
    return [
        value
        for sample in stage.samples
        for value in getattr(sample, name) or ()
        if value is not None
    ]


def _key(stage: StageResults, name: str) -> str:
    return f"{stage.name}-{name}"


def _reward_plots(stage: StageResults) -> list[Plot | None]:
    accuracy = [
        Line("training", stage.curve("accuracy"), FIRST),
        held_out(stage.curve("eval_accuracy")),
    ]
    tables = stage.agreement.calibration.items()
    return [
        _loss_plot(stage, "loss"),
        line_plot(_key(stage, "accuracy"), "pair accuracy", accuracy, bounds=(0.0, 1.0)),
        *(_calibration(stage, name, points) for name, points in tables),
        _learning_rate(stage),
    ]


def _loss_plot(stage: StageResults, title: str) -> Plot | None:
    lines = [Line("training", stage.curve("loss"), FIRST), held_out(stage.curve("eval_loss"))]
    return line_plot(_key(stage, "loss"), title, lines)


def _calibration(stage: StageResults, name: str, points: list[tuple[float, float]]) -> Plot | None:
    """Plot predicted against observed values, bin by bin."""
    xs, ys = [x for x, _ in points], [y for _, y in points]

    def draw(axes: Axes) -> None:
        ends = min(xs + ys), max(xs + ys)
        axes.plot(ends, ends, color=MUTED, linestyle=":", label="equal")
        axes.plot(xs, ys, color=FIRST, marker="o", markersize=4, label="held-out rows")
        axes.set_xlabel("predicted")
        axes.set_ylabel("pair accuracy" if name == "pairs" else "rating")
        legend_above(axes)

    return draw_plot(_key(stage, f"calibration-{name}"), f"calibration: {name}", draw)


def _sft_plots(stage: StageResults) -> list[Plot | None]:
    norm = [Line("norm", stage.curve("grad_norm"), FIRST)]
    return [
        _loss_plot(stage, "loss (NLL, nats per token)"),
        line_plot(_key(stage, "grad"), "gradient norm", norm),
        _learning_rate(stage),
    ]


def _learning_rate(stage: StageResults) -> Plot | None:
    """Plot the learning rate schedule; None for a constant learning rate."""
    rate = stage.curve("learning_rate")
    if len(set(rate.values)) < 2:
        return None
    return line_plot(_key(stage, "rate"), "learning rate", [Line("learning rate", rate, FIRST)])


def _preference_plots(stage: StageResults) -> list[Plot | None]:
    curve = stage.curve
    constant = stage.record.step0.expected if stage.record.step0 else None
    preference = [
        Line("training", curve("loss/preference") or curve("loss"), FIRST),
        held_out(curve("eval_loss/preference") or curve("eval_loss")),
    ]
    gaps = [
        Line("implicit", curve("rewards/margins"), FIRST),
        Line("target", curve("rewards/target_gap"), SECOND),
        Line("held out", curve("eval_rewards/margins"), THIRD, markers=True),
    ]
    gap_title = "implicit reward gap and target gap" if gaps[1].curve else "implicit reward gap"
    moves = [
        Line("chosen", stage.delta("chosen"), FIRST),
        Line("rejected", stage.delta("rejected"), SECOND),
    ]
    fractions = [
        Line("pair accuracy", curve("rewards/accuracies"), FIRST),
        Line("chosen falling", curve("logps/chosen_falling"), SECOND),
    ]
    return [
        line_plot(
            _key(stage, "preference"), "preference loss", preference,
            level=constant, level_label="at step 0",
        ),
        line_plot(_key(stage, "sft"), "SFT term", [Line("SFT term", curve("loss/sft"), SECOND)]),
        line_plot(_key(stage, "gap"), gap_title, gaps),
        line_plot(
            _key(stage, "logps"), "log-prob relative to the reference model, nats", moves,
            level=0.0, level_label="reference",
        ),
        line_plot(_key(stage, "shares"), "fraction of examples", fractions, bounds=(0.0, 1.0)),
        _learning_rate(stage),
        _scatter(stage),
        _gap_histogram(stage),
        _sigma_histogram(stage),
    ]  # fmt: skip


def _scatter(stage: StageResults) -> Plot | None:
    gaps = [(gap.target_gap, gap.implicit_gap) for gap in _thin(stage.gaps)]
    pairs = [(target, implicit) for target, implicit in gaps if target is not None]
    if not pairs or stage.kind != "rpo":
        return None
    xs, ys = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def draw(axes: Axes) -> None:
        low, high = max(min(xs), min(ys)), min(max(xs), max(ys))
        if low < high:
            axes.plot([low, high], [low, high], color=MUTED, linestyle=":", label="equal")
        axes.scatter(xs, ys, s=9, color=FIRST, alpha=0.45, linewidths=0, label="an example")
        axes.set_xlabel("target gap")
        axes.set_ylabel("implicit reward gap")
        legend_above(axes)

    return draw_plot(_key(stage, "scatter"), "gaps of each example after the stage", draw)


def _gap_histogram(stage: StageResults) -> Plot | None:
    series = [("implicit", [gap.implicit_gap for gap in stage.gaps], FIRST)]
    targets = [gap.target_gap for gap in stage.gaps if gap.target_gap is not None]
    if targets and stage.kind == "rpo":
        series.append(("target", targets, SECOND))
    return bars(_key(stage, "gaps"), "gaps after the stage", series, "gap", counted="examples")


def _sigma_histogram(stage: StageResults) -> Plot | None:
    if stage.kind != "rpo":
        return None
    sigmas = [_sigma(gap.target_gap) for gap in stage.gaps if gap.target_gap is not None]
    return bars(
        _key(stage, "sigma"), "σ(target gap)", [("σ(target gap)", sigmas, SECOND)],
        "σ(target gap)", counted="examples",
    )  # fmt: skip


def _thin(gaps: list[GapRecord]) -> list[GapRecord]:
    """Return at most `_MOST_DOTS` of them, evenly spaced, to keep the page small."""
    return gaps[:: max(1, math.ceil(len(gaps) / _MOST_DOTS))]


def _sigma(value: float) -> float:
    """Return the logistic function, without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
