"""What came of a preference stage on held-out data: better than before it, or worse, or noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rpo_trainer.report.collect import RunRecord, StageRecord
from rpo_trainer.report.findings import Finding
from rpo_trainer.report.values import short, signed

_NOISE = "The intervals overlap: it may be noise."


def judge_outcome(run: RunRecord, stage: StageRecord) -> Iterator[Finding]:
    """Its main figure against the stage before it, against those before that, and the baseline."""
    yield from _change(run, stage)
    yield from _decline(run, stage)
    yield from _wins(stage)


def _change(run: RunRecord, stage: StageRecord) -> Iterator[Finding]:
    """The held-out figure against that of the stage which seeded this one."""
    main, parent = stage.scores.main(), run.seed(stage)
    before = parent.scores.main() if parent is not None else None
    if main is None or before is None or parent is None or main[0] != before[0]:
        return
    if not stage.scores.compares(parent.scores):
        yield Finding(
            stage.name,
            "info",
            f"Its figures do not compare with those of {parent.name}: the prompts, the sampling or the "
            "scorer were others.",
        )
        return
    name, after = main
    change = after.value - before[1].value
    values = f"from {short(before[1].value)} to {short(after.value)}"
    on = "what it was before the run" if parent.kind == "before" else parent.name
    text = f"{name.capitalize()} {{}} {values} ({signed(change)} on {on})."
    if after.overlaps(before[1]):
        yield Finding(
            stage.name,
            "info",
            f"{text.format('went')} {_NOISE}",
            "More held-out prompts would tell.",
        )
    elif change > 0:
        yield Finding(stage.name, "good", text.format("rose"))
    else:
        yield Finding(
            stage.name,
            "bad",
            text.format("fell"),
            "Raise β or lower the learning rate; sample the responses from the policy that seeds "
            "the stage.",
        )


def _decline(run: RunRecord, stage: StageRecord) -> Iterator[Finding]:
    """Small falls that may each be noise, one behind the other, are none."""
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
        "warn",
        f"{main[0].capitalize()} has fallen in each of the last {falls} stages: {shown}.",
        f"Take the output of {line[-1 - falls].name}. Where a reward model gives the rewards of the "
        "training rows, train it anew on what the policy says now; else raise β or lower the "
        "learning rate.",
    )


def _wins(stage: StageRecord) -> Iterator[Finding]:
    """Against a baseline that most likely is no better: the interval should lie above one half."""
    wins = stage.scores.win_rate
    if wins is None or wins.low is None or wins.high is None:
        return
    text = (
        f"Its responses win {wins.value:.0%} of the time against {stage.scores.baseline} "
        f"({wins.low:.0%} to {wins.high:.0%})."
    )
    if wins.low > 0.5:
        yield Finding(stage.name, "good", text)
    elif wins.high < 0.5:
        yield Finding(stage.name, "bad", text, "Raise β or lower the learning rate.")
    else:
        yield Finding(stage.name, "info", f"{text} That may be noise.")


def whole_change(run: RunRecord) -> str:
    """The main figure after the last stage, against the seed of the first preference stage."""
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
    moved = "went" if noise or not change else "rose" if change > 0 else "fell"
    since = "before the run" if base.kind == "before" else f"after {base.name}"
    best = max(scored, key=lambda stage: _main_value(stage, end[0]))
    better = _main_value(best, end[0]) > end[1].value
    return (
        f" {start[0].capitalize()} {moved} from {short(start[1].value)} {since} "
        f"to {short(end[1].value)} after {scored[-1].name} ({signed(change)})."
        + (f" {_NOISE}" if noise else "")
        + (f" It was best after {best.name}: {short(_main_value(best, end[0]))}." * better)
    )


def _main_value(stage: StageRecord, name: str) -> float:
    main = stage.scores.main()
    return main[1].value if main is not None and main[0] == name else -math.inf
