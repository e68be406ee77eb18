"""The comparison of all stages, once for the terminal and once for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from rpo_trainer.report.collect import RunRecord, StageRecord, collect_run
from rpo_trainer.report.scores import Measure
from rpo_trainer.report.values import duration, short, size


@dataclass(frozen=True)
class Cell:
    """A figure and its interval, both as text; `best` marks the best stage of the column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A column's head, and one cell per stage; `brief` is its head where room is scarce."""

    head: str
    brief: str | None
    cells: list[Cell]


def comparison(run: RunRecord) -> list[Column]:
    """The columns that at least one stage has something for, in reading order."""
    stages = run.stages
    scores = [stage.scores for stage in stages]
    columns = [
        _measures("exact match, greedy", "exact\ngreedy", [x.exact_greedy for x in scores], 3),
        _measures("exact match, sampled", "exact\nsampled", [x.exact_sampled for x in scores], 3),
        _measures("mean reward, greedy", "reward\ngreedy", [x.reward_greedy for x in scores], 2),
        _measures("mean reward, sampled", "reward\nsampled", [x.reward_sampled for x in scores], 2),
        _nll(stages),
        _measures(
            "better response has the higher reward",
            "pairs\nright",
            [stage.agreement.accuracy for stage in stages],
            3,
        ),
        _measures(
            "correlation with given rewards",
            "corre-\nlation",
            [
                None if (found := stage.agreement.correlation()) is None else Measure(found)
                for stage in stages
            ],
            3,
        ),
        Column("step-0 check", "step-0\ncheck", [Cell(_step_zero(stage)) for stage in stages]),
        Column("examples", None, [Cell(_whole(stage.examples)) for stage in stages]),
        Column("steps", None, [Cell(_whole(stage.steps)) for stage in stages]),
        Column("time", "time", [Cell(duration(stage.seconds)) for stage in stages]),
        Column("peak memory", "memory", [Cell(size(x.peak_memory_bytes)) for x in stages]),
    ]
    return [column for column in columns if any(cell.text != "–" for cell in column.cells)]


def summary_table(run_dir: Path) -> Table:
    """The comparison of all stages, for a terminal of 80 columns; intervals are left to the page.

    Raises:
        RunError: `run_dir` is not a run directory.
    """
    run = collect_run(run_dir)
    table = Table(title=run.name, title_justify="left", box=None, pad_edge=False)
    table.add_column("after", no_wrap=True)
    columns = [column for column in comparison(run) if column.brief is not None]
    for column in columns:
        table.add_column(column.brief or "", justify="right", no_wrap=True)
    for row, stage in enumerate(run.stages):
        name = stage.name if stage.state == "done" else f"{stage.name} ({stage.state})"
        cells = [column.cells[row] for column in columns]
        table.add_row(Text(name), *(Text(x.text, "bold" if x.best else "") for x in cells))
    return table


def _measures(
    head: str,
    brief: str,
    found: Sequence[Measure | None],
    digits: int,
    best: Callable[[list[float]], float] | None = max,
) -> Column:
    values = [measure.value for measure in found if measure is not None]
    # With one value there is nothing to compare.
    winner = best(values) if best is not None and len(values) > 1 else None
    cells = []
    for measure in found:
        if measure is None:
            cells.append(Cell("–"))
            continue
        interval = ""
        if measure.low is not None and measure.high is not None:
            interval = f"{short(measure.low, digits)} to {short(measure.high, digits)}"
        cells.append(Cell(short(measure.value, digits), interval, measure.value == winner))
    return Column(head, brief, cells)


def _nll(stages: Sequence[StageRecord]) -> Column:
    """NLL of the chain's evaluation; without one, each SFT stage's own held-out loss.

    Those are on the data of each stage, so none of them is the best.
    """
    evaluated = [stage.scores.nll for stage in stages]
    if any(measure is not None for measure in evaluated):
        return _measures("NLL", "NLL", evaluated, 3, best=min)
    own = [stage.curve("eval_loss") if stage.kind == "sft" else None for stage in stages]
    last = [Measure(curve.values[-1]) if curve else None for curve in own]
    return _measures("held-out NLL, own data", "own\nNLL", last, 3, best=None)


def _step_zero(stage: StageRecord) -> str:
    if stage.step0 is None or stage.step0.ok is None:
        return "–"
    return "passed" if stage.step0.ok else "FAILED"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
