"""The comparison of all stages, once for the terminal and once for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rpo_trainer.report.collect import RunResults, StageResults, collect_run
from rpo_trainer.report.formatting import duration, short, size
from rpo_trainer.report.scores import EvalScores, Measure, one_measure

# Figures of responses: key, head, brief head, digits.
_RESPONSES = (
    ("exact_greedy", "exact match, greedy", "exact\ngreedy", 3),
    ("exact_sampled", "exact match, sampled", "exact\nsampled", 3),
    ("reward_greedy", "mean reward, greedy", "reward\ngreedy", 2),
    ("reward_sampled", "mean reward, sampled", "reward\nsampled", 2),
)
_BRIEF = {
    "pairs: chosen likelier": "chosen\nlikelier",
    "pairs right": "pairs\nright",
    "margin": "margin,\nnats",
    "log-prob of chosen": "Δchosen,\nnats",
}
_TERMINAL = 80
# What is left out first where it cannot hold all: the rest says as much.
_LEAST = ("memory", "exact\ngreedy", "reward\ngreedy", "exact\nsampled", "time")
_SHOWN_WARNINGS = 4  # the last ones: a status is one screen


@dataclass(frozen=True)
class Cell:
    """A figure and its interval, both as text; `best` marks the best stage of the column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column's key and head, and one cell per stage.

    Attributes:
        key: what it holds; the head may change, the key does not.
        brief: its head where room is scarce; None: for the page alone.
        held_out: measured on rows that no stage was trained on.
    """

    key: str
    head: str
    brief: str | None
    cells: list[Cell]
    held_out: bool = False


def comparison(run: RunResults) -> list[Column]:
    """The columns that at least one stage has something for, in reading order; a cell for each `compared`."""
    stages = run.compared
    scores = [stage.scores for stage in stages]
    # Of figures that do not compare none is the best.
    best = max if one_measure(scores) else None
    measured = [
        *(
            _measures(key, head, brief, [getattr(own, key) for own in scores], digits, best)
            for key, head, brief, digits in _RESPONSES
        ),
        _wins(scores),
        _nll(stages),
        *_others(scores),
        _measures(
            "reward_accuracy",
            "better response has the higher reward",
            "pairs\nright",
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


def status_view(run_dir: Path) -> Group:
    """One screen: the table of the stages, and below it what was warned of while they trained.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    run = collect_run(run_dir)
    given = [(stage.name, early) for stage in run.stages for early in stage.record.warnings or ()]
    lines = [
        Text(
            f"{name}, step {warning.step}: {warning.text}. To try: {warning.advice}.",
            style="yellow",
            overflow="fold",
        )
        for name, warning in given[-_SHOWN_WARNINGS:]
    ]
    if left := len(given) - len(lines):
        lines.insert(
            0, Text(f"{left} earlier warning{'s' if left > 1 else ''} (rpo-trainer report)")
        )
    return Group(_table(run), *([Text()] if lines else []), *lines)


def summary_table(run_dir: Path) -> Table:
    """The comparison of all stages, for a terminal of 80 columns; intervals are left to the page.

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
    if left_out:
        table.caption = f"no room for: {'; '.join(left_out)} (rpo-trainer report)"
        table.caption_justify = "left"
    table.add_column("after", no_wrap=True)
    for column in columns:
        table.add_column(column.brief or "", justify="right", no_wrap=True)
    for row, name in enumerate(names):
        cells = [column.cells[row] for column in columns]
        table.add_row(Text(name), *(Text(x.text, "bold" if x.best else "") for x in cells))
    return table


def _width(names: Sequence[str], columns: Sequence[Column]) -> int:
    """Of a table in characters, with two between its columns."""
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
    # With one value, or the same throughout, there is nothing to compare.
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
    """Stages may have baselines of their own: the cell says which, where they do."""
    names = {score.baseline for score in scores if score.win_rate is not None}
    head = f"win rate against {names.pop()}" if len(names) == 1 else "win rate"
    # A terminal has room for it where nothing else tells the responses apart, as with a judge.
    brief = None if any(score.reward_sampled for score in scores) else "win\nrate"
    column = _measures("win_rate", head, brief, [score.win_rate for score in scores], 3)
    if not names:  # one baseline for all: the head says which
        return column
    cells = [
        replace(cell, interval=f"{cell.interval} against {score.baseline}")
        if cell.interval
        else cell
        for cell, score in zip(column.cells, scores, strict=True)
    ]
    return replace(column, cells=cells)


def _others(scores: Sequence[EvalScores]) -> list[Column]:
    """Held-out pairs, NLL by source, tasks: a column for each that some stage has.

    They are the page's alone where rewards fill the terminal; else pairs are shown there as well.
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
    """Each SFT stage's held-out loss: on rows of its own kind, so that none of them is the best."""
    measured = [stage.scores.nll for stage in stages]
    if not any(measured):
        curves = [stage.curve("eval_loss") if stage.kind == "sft" else None for stage in stages]
        measured = [Measure(curve.values[-1]) if curve else None for curve in curves]
    return _measures("nll", "held-out NLL, own data", "own\nNLL", measured, 3, best=None)


def _of_training(stages: Sequence[StageResults]) -> list[Column]:
    """Where nothing was held out: how training ended, on its own rows, so that no stage is the best."""
    curves = [
        ("loss", "training loss, at the end", "loss", [stage.curve("loss") for stage in stages]),
        (
            "gap",
            "implicit gap, at the end",
            "gap",
            [stage.curve("rewards/margins") for stage in stages],
        ),
        (
            "preferred",
            "preferred in training, at the end",
            "chosen\npreferred",
            [stage.curve("rewards/accuracies") for stage in stages],
        ),
        (
            "chosen_delta",
            "log-prob of chosen, change",
            "Δchosen,\nnats",
            [x.delta("chosen") for x in stages],
        ),
    ]
    return [
        _measures(key, head, brief, [Measure(c.end()) if c else None for c in found], 3, best=None)
        for key, head, brief, found in curves
    ]


def _step_zero(stage: StageResults) -> str:
    check = stage.record.step0
    if check is None or check.ok is None:
        return "–"
    return "passed" if check.ok else "FAILED"


def _time(stage: StageResults) -> str:
    """What is not done has taken no time yet: in its place stands how far it is."""
    state = stage.record.state
    if state == "running" and stage.metrics and "step" in stage.metrics[-1]:
        return f"step {stage.metrics[-1]['step']}"  # running or stopped: the file does not tell
    return duration(stage.record.seconds) if state == "done" else state


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
