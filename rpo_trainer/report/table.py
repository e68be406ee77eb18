"""Table of all stages, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rpo_trainer.report.collect import Curve, RunResults, StageResults, collect_run
from rpo_trainer.report.formatting import counted, duration, short, size
from rpo_trainer.report.scores import EvalScores, Measure, one_measure

# Response figures: key, head, short head, digits.
_RESPONSES = (
    ("exact_greedy", "exact match, greedy", "exact\ngreedy", 3),
    ("exact_sampled", "exact match, sampled", "exact\nsampled", 3),
    ("reward_greedy", "mean reward, greedy", "reward\ngreedy", 2),
    ("reward_sampled", "mean reward, sampled", "reward\nsampled", 2),
)
_BRIEF = {
    "held-out pairs: chosen has": "chosen\nhigher",
    "held-out pair accuracy": "pair\naccuracy",
    "log-ratio gap": "gap,\nnats",
    "log-prob change of chosen": "Δchosen,\nnats",
}
# Of a preference stage on its own held-out pairs: key → head, short head, metric.
OWN_PAIRS = {
    "own_gap": ("implicit reward gap, own held-out pairs", "gap", "eval_rewards/margins"),
    "own_accuracy": (
        "pair accuracy, own held-out pairs",
        "pair\naccuracy",
        "eval_rewards/accuracies",
    ),
}
# Training metrics, for runs without held-out data: key → head, short head, curve of a stage.
_OF_TRAINING: dict[str, tuple[str, str, Callable[[StageResults], Curve]]] = {
    "loss": ("training loss, end", "loss", lambda stage: stage.curve("loss")),
    "gap": ("implicit reward gap, end", "gap", lambda stage: stage.curve("rewards/margins")),
    "preferred": (
        "pair accuracy in training, end",
        "pair\naccuracy",
        lambda stage: stage.curve("rewards/accuracies"),
    ),
    "chosen_delta": (
        "log-prob change of chosen",
        "Δchosen,\nnats",
        lambda stage: stage.delta("chosen"),
    ),
}
_TERMINAL = 80
# Columns that are left out first if the table is too wide.
_LEAST = ("memory", "exact\ngreedy", "reward\ngreedy", "exact\nsampled", "time")
_SHOWN_WARNINGS = 4  # the last ones, so that a status fits one screen


@dataclass(frozen=True)
class Cell:
    """A figure and its interval as text; `best`: the best stage of the column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column's key and head, and one cell per stage.

    Attributes:
        key: stable name; the head may change.
        brief: the head in the terminal; None: not shown there.
        held_out: whether the figure was measured on held-out data.
    """

    key: str
    head: str
    brief: str | None
    cells: list[Cell]
    held_out: bool = False


def comparison(run: RunResults) -> list[Column]:
    """Return the columns with at least one value, in display order; one cell per stage of `run.compared`."""
    stages = run.compared
    scores = [stage.scores for stage in stages]
    # Without comparable figures there is no best stage.
    best = max if one_measure(scores) else None
    measured = [
        *(
            _measures(key, head, brief, [getattr(own, key) for own in scores], digits, best)
            for key, head, brief, digits in _RESPONSES
        ),
        _wins(scores),
        _nll(stages),
        *_others(scores),
        *_own_pairs(stages, scores),
        _measures(
            "reward_accuracy",
            "held-out pair accuracy",
            "pair\naccuracy",
            [stage.agreement.accuracy for stage in stages],
            3,
        ),
        _measures(
            "correlation",
            "correlation with given rewards",
            "corre-\nlation",
            [
                None if (found := stage.agreement.correlation()) is None else Measure(found)
                for stage in stages
            ],
            3,
        ),
    ]
    measured = [replace(column, held_out=True) for column in measured if _has_something(column)]
    columns = [
        *(measured or _of_training(stages)),
        Column(
            "step0", "step-0 check", "step-0\ncheck", [Cell(_step_zero(stage)) for stage in stages]
        ),
        Column("examples", "examples", None, [Cell(_whole(x.record.examples)) for x in stages]),
        Column("steps", "steps", None, [Cell(_whole(x.record.steps)) for x in stages]),
        Column("time", "time", "time", [Cell(_time(stage)) for stage in stages]),
        Column(
            "peak_memory",
            "peak memory",
            "memory",
            [Cell(size(x.record.peak_memory_bytes)) for x in stages],
        ),
    ]
    return [column for column in columns if _has_something(column)]


def _has_something(column: Column) -> bool:
    return any(cell.text != "–" for cell in column.cells)


def status_view(run: RunResults) -> Group:
    """Return the table of all stages, followed by the last early warnings."""
    given = [(stage.name, early) for stage in run.stages for early in stage.record.warnings or ()]
    lines = [
        Text(
            f"{name}, step {warning.step}: {warning.text}. Try: {warning.advice}.",
            style="yellow",
            overflow="fold",
        )
        for name, warning in given[-_SHOWN_WARNINGS:]
    ]
    if left := len(given) - len(lines):
        lines.insert(0, Text(f"{counted(left, 'earlier warning')} (see rpo-trainer report)"))
    return Group(_table(run), *([Text()] if lines else []), *lines)


def summary_table(run_dir: Path) -> Table:
    """Return the table of all stages for a terminal of 80 columns, without intervals.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    return _table(collect_run(run_dir))


def _table(run: RunResults) -> Table:
    names = [stage.name for stage in run.compared]
    columns, left_out = [column for column in comparison(run) if column.brief is not None], []
    for brief in _LEAST:
        if _width(names, columns) > _TERMINAL:
            left_out += [column.head for column in columns if column.brief == brief]
            columns = [column for column in columns if column.brief != brief]
    table = Table(title=run.name, title_justify="left", box=None, pad_edge=False)
    captions = [_origin(columns)]
    if left_out:
        captions.append(f"not shown: {'; '.join(left_out)} (see rpo-trainer report)")
    if text := "\n".join(filter(None, captions)):
        table.caption, table.caption_justify = text, "left"
    table.add_column("after", no_wrap=True)
    for column in columns:
        table.add_column(column.brief or "", justify="right", no_wrap=True)
    for row, name in enumerate(names):
        cells = [column.cells[row] for column in columns]
        table.add_row(Text(name), *(Text(x.text, "bold" if x.best else "") for x in cells))
    return table


def _origin(columns: Sequence[Column]) -> str | None:
    """Say where the figures are from, if their heads do not."""
    keys = {column.key for column in columns}
    if keys & OWN_PAIRS.keys():
        return "gap: implicit reward; gap and pair accuracy on each stage's own held-out pairs"
    if keys & _OF_TRAINING.keys():
        return "no held-out figures: training metrics at the end of each stage"
    return None


def _width(names: Sequence[str], columns: Sequence[Column]) -> int:
    """Return the width of a table in characters, with two between columns."""
    widths = [max(map(len, ["after", *names]))]
    for column in columns:
        heads = (column.brief or "").split("\n")
        widths.append(max(map(len, [*heads, *(cell.text for cell in column.cells)])))
    return sum(widths) + 2 * len(columns)


def _measures(
    key: str,
    head: str,
    brief: str | None,
    found: Sequence[Measure | None],
    digits: int,
    best: Callable[[list[float]], float] | None = max,
) -> Column:
    values = [measure.value for measure in found if measure is not None]
    # A single value, or equal values, have no best.
    winner = best(values) if best is not None and len(set(values)) > 1 else None
    cells = []
    for measure in found:
        if measure is None:
            cells.append(Cell("–"))
            continue
        interval = ""
        if measure.low is not None and measure.high is not None:
            interval = f"{short(measure.low, digits)} to {short(measure.high, digits)}"
        cells.append(Cell(short(measure.value, digits), interval, measure.value == winner))
    return Column(key, head, brief, cells)


def _wins(scores: Sequence[EvalScores]) -> Column:
    """Return the column of win rates; with different baselines, each cell names its baseline."""
    names = {score.baseline for score in scores if score.win_rate is not None}
    head = f"win rate against {names.pop()}" if len(names) == 1 else "win rate"
    # Shown in the terminal only if there are no rewards, as with a judge.
    brief = None if any(score.reward_sampled for score in scores) else "win\nrate"
    column = _measures("win_rate", head, brief, [score.win_rate for score in scores], 3)
    if not names:  # a single baseline, named in the head
        return column
    cells = [
        replace(cell, interval=f"{cell.interval} against {score.baseline}")
        if cell.interval
        else cell
        for cell, score in zip(column.cells, scores, strict=True)
    ]
    return replace(column, cells=cells)


def _others(scores: Sequence[EvalScores]) -> list[Column]:
    """Return one column per figure: held-out pairs, NLL by source, lm-eval tasks.

    The terminal shows pairs only if there are no rewards.
    """
    room = not any(score.reward_sampled or score.reward_greedy for score in scores)
    by_stage = [{figure.name: figure for figure in score.others} for score in scores]
    last = {name: figure for own in by_stage for name, figure in own.items()}
    columns = []
    for name, figure in last.items():
        best = None if figure.higher is None else max if figure.higher else min
        found = [own[name].measure if name in own else None for own in by_stage]
        brief = next((_BRIEF[words] for words in _BRIEF if name.startswith(words)), None)
        columns.append(
            _measures(figure.key, name, brief if room else None, found, figure.digits, best)
        )
    return columns


def _nll(stages: Sequence[StageResults]) -> Column:
    """Return the held-out loss of each SFT stage, on its own data, so that none is the best."""
    measured = [stage.scores.nll for stage in stages]
    if not any(measured):
        curves = [stage.curve("eval_loss") if stage.kind == "sft" else None for stage in stages]
        measured = [Measure(curve.values[-1]) if curve else None for curve in curves]
    return _measures("nll", "held-out NLL, own data", "own\nNLL", measured, 3, best=None)


def _own_pairs(stages: Sequence[StageResults], scores: Sequence[EvalScores]) -> list[Column]:
    """Implicit reward gap and pair accuracy on the held-out pairs of each preference stage.

    Each stage has its own pairs and reference model, so there is no best. Not shown next to figures of the
    recipe's `eval`, which all stages share.
    """
    if any(score.others or score.main() for score in scores):
        return []
    return [
        _measures(
            key,
            head,
            brief,
            [own_measure(stage, metric) for stage in stages],
            3,
            best=None,
        )
        for key, (head, brief, metric) in OWN_PAIRS.items()
    ]


def own_measure(stage: StageResults, metric: str) -> Measure | None:
    """Return the last value of a metric on the stage's own held-out examples; None if not measured."""
    curve = stage.curve(metric)
    return Measure(curve.values[-1]) if curve else None


def _of_training(stages: Sequence[StageResults]) -> list[Column]:
    """Return training metrics at the end of each stage, for runs without held-out data."""
    return [
        _measures(
            key,
            head,
            brief,
            [Measure(c.end()) if (c := curve(stage)) else None for stage in stages],
            3,
            best=None,
        )
        for key, (head, brief, curve) in _OF_TRAINING.items()
    ]


def _step_zero(stage: StageResults) -> str:
    check = stage.record.step0
    if check is None or check.ok is None:
        return "–"
    return "passed" if check.ok else "FAILED"


def _time(stage: StageResults) -> str:
    """Return the time of a finished stage, or the state of an unfinished one."""
    state = stage.record.state
    if state == "running" and stage.metrics and "step" in stage.metrics[-1]:
        return f"step {stage.metrics[-1]['step']}"  # running or stopped
    return duration(stage.record.seconds) if state == "done" else state


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
