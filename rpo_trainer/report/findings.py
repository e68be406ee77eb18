"""Findings about a preference stage: held-out figures, and log-probs of chosen and rejected responses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rpo_trainer.report.collect import RunResults, StageResults
from rpo_trainer.report.formatting import short, signed
from rpo_trainer.report.scores import MAIN_FIGURES

Level = Literal["good", "info", "warn", "bad"]
# A decrease of the chosen log-prob below this number of nats per response, or below this fraction of
# its magnitude, is treated as noise.
DECLINE_NATS = 0.5
DECLINE_FRACTION = 0.02
_NOISE = "The intervals overlap, so this may be noise."


@dataclass(frozen=True)
class Finding:
    """One statement about a stage.

    Attributes:
        key: stable name of the finding; the wording may change.
        advice: what to change.
    """

    stage: str
    key: str
    level: Level
    text: str
    advice: str | None = None


def judge_outcome(run: RunResults, stage: StageResults) -> Iterator[Finding]:
    """Compare the main figure with the previous stage, with all earlier stages, and with the baseline."""
    yield from _change(run, stage)
    yield from _decline(run, stage)
    yield from _wins(stage)


def _change(run: RunResults, stage: StageResults) -> Iterator[Finding]:
    """Compare the main figure with that of the stage this one started from."""
    main, parent = stage.scores.main(), run.seed(stage)
    before = parent.scores.main() if parent is not None else None
    if main is None or before is None or parent is None or main[0] != before[0]:
        return
    if not stage.scores.compares(parent.scores):
        yield Finding(
            stage.name,
            "figures-do-not-compare",
            "info",
            f"The figures are not comparable with those of {parent.name}: prompts, sampling or "
            "scorer differ.",
        )
        return
    after = main[1]
    change = after.value - before[1].value
    values = f"from {short(before[1].value)} to {short(after.value)}"
    start = "the start of the run" if parent.kind == "before" else parent.name
    text = f"{_main_name(main[0])} {{}} {values} ({signed(change)} relative to {start})."
    if after.overlaps(before[1]):
        yield Finding(
            stage.name,
            "figure-unclear",
            "info",
            f"{text.format('changed')} {_NOISE}",
            "Use more held-out prompts to narrow the intervals.",
        )
    elif change > 0:
        yield Finding(stage.name, "figure-rose", "good", text.format("rose"))
    else:
        yield Finding(
            stage.name,
            "figure-fell",
            "bad",
            text.format("fell"),
            "Raise β or lower the learning rate, and sample the responses from the policy that the "
            "stage starts from.",
        )


def _decline(run: RunResults, stage: StageResults) -> Iterator[Finding]:
    """Report several decreases in a row: they are unlikely to be noise, even if each may be."""
    main = stage.scores.main()
    if main is None:
        return
    line, values = [stage], [main[1].value]
    while (parent := run.parent(line[0])) is not None and parent.scores.compares(stage.scores):
        line.insert(0, parent)
        values.insert(0, _main_value(parent, main[0]))
    falls = 0
    while falls + 1 < len(values) and values[-1 - falls] < values[-2 - falls]:
        falls += 1
    is_last = not any(run.parent(other) is stage and other.scores.main() for other in run.stages)
    if falls < 2 or not is_last:
        return
    shown = ", ".join(short(value) for value in values[-1 - falls :])
    yield Finding(
        stage.name,
        "figure-keeps-falling",
        "warn",
        f"{_main_name(main[0])} fell in each of the last {falls} stages: {shown}.",
        f"Use the output of {line[-1 - falls].name}. If a reward model scores the training rows, "
        "retrain it on responses of the current policy; otherwise raise β or lower the learning rate.",
    )


def _wins(stage: StageResults) -> Iterator[Finding]:
    """Judge the win rate against the baseline: the entire interval should be above one half."""
    wins = stage.scores.win_rate
    if wins is None or wins.low is None or wins.high is None:
        return
    text = (
        f"Win rate against {stage.scores.baseline}: {wins.value:.0%} "
        f"({wins.low:.0%} to {wins.high:.0%})."
    )
    if wins.low > 0.5:
        yield Finding(stage.name, "wins", "good", text)
    elif wins.high < 0.5:
        yield Finding(stage.name, "loses", "bad", text, "Raise β or lower the learning rate.")
    else:
        yield Finding(stage.name, "wins-unclear", "info", f"{text} This may be noise.")


def overall_change(run: RunResults) -> str:
    """Return a sentence about the main figure from the first preference stage to the last stage."""
    first = next((stage for stage in run.stages if stage.is_preference), None)
    base = run.seed(first) if first is not None else None
    scored = [stage for stage in run.stages if stage.is_preference and stage.scores.main()]
    if base is None or not scored or not scored[-1].scores.compares(base.scores):
        return ""
    scored = [stage for stage in scored if stage.scores.compares(base.scores)]
    start, end = base.scores.main(), scored[-1].scores.main()
    assert start is not None and end is not None  # they compare
    change = end[1].value - start[1].value
    noise = end[1].overlaps(start[1])
    moved = "changed" if noise or not change else "rose" if change > 0 else "fell"
    since = "before the run" if base.kind == "before" else f"after {base.name}"
    best = max(scored, key=lambda stage: _main_value(stage, end[0]))
    better = _main_value(best, end[0]) > end[1].value
    return (
        f" {_main_name(start[0])} {moved} from {short(start[1].value)} {since} "
        f"to {short(end[1].value)} after {scored[-1].name} ({signed(change)})."
        + (f" {_NOISE}" if noise else "")
        + (f" It was highest after {best.name}: {short(_main_value(best, end[0]))}." * better)
    )


def _main_name(key: str) -> str:
    """Return the name of a main figure for the start of a sentence."""
    name = MAIN_FIGURES[key]
    return name[0].upper() + name[1:]


def _main_value(stage: StageResults, key: str) -> float:
    main = stage.scores.main()
    return main[1].value if main is not None and main[0] == key else -math.inf


def judge_likelihood(stage: StageResults) -> Iterator[Finding]:
    """Report likelihood decline: chosen responses became less likely than under the reference model."""
    delta = stage.delta("chosen")
    if not delta:
        return
    change, level_of_logps = delta.end(), stage.curve("logps/chosen")
    falling = stage.curve("logps/chosen_falling")
    share = f"; it decreased in {falling.end():.0%} of the examples" if falling else ""
    bound = max(
        DECLINE_NATS, DECLINE_FRACTION * abs(level_of_logps.start()) if level_of_logps else 0.0
    )
    if change >= 0:
        text = f"The log-prob of chosen responses rose by {short(change)} nats per response{share}."
        yield Finding(stage.name, "likelihood-rose", "good", text)
    elif -change <= bound:
        text = f"The log-prob of chosen responses is nearly unchanged: {short(change)} nats per response"
        yield Finding(stage.name, "likelihood-held", "good", f"{text}{share}.")
    else:
        size = abs(level_of_logps.start()) if level_of_logps else 0.0
        relative = f" ({-change / size:.0%} of its magnitude)" if size else ""
        text = (
            f"Likelihood decline: the log-prob of chosen responses fell by {short(-change)} nats "
            f"per response{relative}{share}. {_rejected_too(stage, change)}"
        )
        yield Finding(stage.name, "likelihood-decline", "warn", text, _decline_advice(stage))


def _rejected_too(stage: StageResults, chosen_change: float) -> str:
    """Describe the change of the rejected responses, given that the chosen log-prob fell."""
    rejected = stage.delta("rejected")
    if not rejected:
        return "Any gap then comes from lowering the rejected responses, not from raising the chosen ones."
    fall = short(-rejected.end())
    if rejected.end() < chosen_change:
        return (
            f"That of rejected responses fell by {fall}: the entire gap comes from lowering them."
        )
    return "That of rejected responses did not fall further, so the gap is not positive."


def _decline_advice(stage: StageResults) -> str:
    weight, beta = stage.setting("sft_loss_weight"), stage.setting("beta")
    advice = []
    if not weight:
        advice.append("set sft_loss_weight above 0 (now 0) to keep the chosen log-prob up")
    else:
        advice.append(f"raise sft_loss_weight (now {weight:g}; try {3 * weight:g})")
    advice.append(f"raise β (now {beta:g})" if beta else "raise β")
    advice.append("lower the learning rate or train fewer steps")
    text = "; or ".join(advice) + "."
    return text[0].upper() + text[1:]
