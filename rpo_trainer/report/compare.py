"""Comparison of runs: final figures, differing recipe keys, and what the runs were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rpo_trainer.errors import RunError
from rpo_trainer.report.collect import RunResults, StageResults, collect_run
from rpo_trainer.report.formatting import duration, short, size
from rpo_trainer.report.paths import without_absolute_paths
from rpo_trainer.report.scores import Figure, Measure, one_measure
from rpo_trainer.report.table import OWN_PAIRS, own_measure

_ABSENT = "–"
_LONGEST = 80  # characters of a recipe value


@dataclass(frozen=True)
class Value:
    """A figure of one run and its interval, as text; `best`: the best of all runs."""

    text: str = _ABSENT
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class FigureRow:
    """A figure with one value per run."""

    key: str
    name: str
    values: list[Value]


@dataclass(frozen=True)
class Difference:
    """A key of recipe or system whose value differs, with its text in each run."""

    key: str
    values: list[str]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: unique display names, in the order of `runs`.
        figures: after the last measured stage of each run.
        differences: recipe keys and system entries that are not the same in all runs.
        notes: what limits the comparison.
    """

    names: list[str]
    runs: list[RunResults]
    figures: list[FigureRow]
    differences: list[Difference]
    notes: list[str]


def compare_runs(run_dirs: Sequence[Path]) -> Comparison:
    """Read the runs and compare them.

    Raises:
        RunError: one of them is not a run directory, or is given twice.
    """
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise RunError(
                "the same run is given twice",
                code="report.repeated-run",
                where=str(run_dirs[place]),
                fix="name different run directories",
            )
    runs = [collect_run(run_dir) for run_dir in run_dirs]
    names = _unique_names(resolved)
    finals = [_final(run) for run in runs]
    notes = [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes]
    comparable = one_measure([stage.scores for stage in finals if stage is not None])
    if not comparable:
        notes.append("The response figures are not comparable: prompts, sampling or scorer differ.")
    settings = [
        {**_flat(_recipe(run)), **_system(final)} for run, final in zip(runs, finals, strict=True)
    ]
    return Comparison(
        names=names,
        runs=runs,
        figures=[*_progress(runs, finals), *_figures(finals, comparable), *_costs(runs)],
        differences=_differences(settings, resolved),
        notes=notes,
    )


def comparison_view(comparison: Comparison) -> Group:
    """Return the comparison as tables for the terminal."""
    figures = Table(box=None, pad_edge=False)
    figures.add_column("", overflow="fold")
    for name in comparison.names:
        figures.add_column(Text(name), justify="right", overflow="fold")
    for row in comparison.figures:
        figures.add_row(Text(row.name), *(_cell(value) for value in row.values))
    parts: list[Any] = [figures]
    if comparison.differences:
        differing = Table(
            title="Differing settings", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        differing.add_column("", overflow="fold")
        for name in comparison.names:
            differing.add_column(Text(name), overflow="fold")
        for difference in comparison.differences:
            differing.add_row(Text(difference.key), *map(Text, difference.values))
        parts += [Text(), differing]
    else:
        parts += [Text(), Text("The recipes are the same.")]
    parts += [Text(note, "yellow", overflow="fold") for note in comparison.notes]
    return Group(*parts)


def _cell(value: Value) -> Text:
    text = Text(value.text, "bold" if value.best else "")
    return text.append(f"\n{value.interval}", "dim") if value.interval else text


def _unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or more parts if these are equal."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]  # the same folder twice, which is refused


def _final(run: RunResults) -> StageResults | None:
    """Return the last stage with held-out figures; without any, the last stage that has started."""
    measured = [stage for stage in run.stages if stage.scores.all() or stage.agreement.accuracy]
    begun = [stage for stage in run.stages if stage.record.state != "pending"]
    return (measured or begun or [None])[-1]  # type: ignore[list-item]


def _progress(runs: Sequence[RunResults], finals: Sequence[StageResults | None]) -> list[FigureRow]:
    done = [sum(stage.record.state == "done" for stage in run.stages) for run in runs]
    states = [Value(f"{count} of {len(run.stages)}") for count, run in zip(done, runs, strict=True)]
    measured = [Value(stage.name if stage is not None else _ABSENT) for stage in finals]
    return [
        FigureRow("stages", "stages done", states),
        FigureRow("after", "measured after", measured),
    ]


def _figures(finals: Sequence[StageResults | None], comparable: bool) -> list[FigureRow]:
    by_run = [{} if stage is None else _figures_of(stage) for stage in finals]
    keys = dict.fromkeys(key for own in by_run for key in own)
    rows = []
    for key in keys:
        found = [own.get(key) for own in by_run]
        first = next(figure for figure in found if figure is not None)
        best = _best(found, first.higher) if comparable else None
        values = [
            Value()
            if figure is None or figure.measure is None
            else Value(
                short(figure.measure.value, first.digits),
                _interval(figure.measure, first.digits),
                figure.measure.value == best,
            )
            for figure in found
        ]
        rows.append(FigureRow(key, first.name, values))
    gaps = [Value() if stage is None else _gap(stage) for stage in finals]
    if any(value.text != _ABSENT for value in gaps):
        rows.append(FigureRow("gap", "implicit reward gap, end of training", gaps))
    return rows


def _figures_of(stage: StageResults) -> dict[str, Figure]:
    found = {figure.key: figure for figure in stage.scores.all()}
    if (accuracy := stage.agreement.accuracy) is not None:
        found["reward_accuracy"] = Figure("reward_accuracy", "held-out pair accuracy", accuracy)
    if not found and stage.is_preference:
        for key, (head, _, metric) in OWN_PAIRS.items():
            if (measure := own_measure(stage, metric)) is not None:
                found[key] = Figure(key, head, measure, higher=None)
    return found


def _best(found: Sequence[Figure | None], higher: bool | None) -> float | None:
    """Return the best value; None if there is nothing to compare or better is not defined."""
    values = [x.measure.value for x in found if x is not None and x.measure is not None]
    if higher is None or len(set(values)) < 2:
        return None
    return max(values) if higher else min(values)


def _interval(measure: Measure, digits: int) -> str:
    if measure.low is None or measure.high is None:
        return ""
    return f"{short(measure.low, digits)} to {short(measure.high, digits)}"


def _gap(stage: StageResults) -> Value:
    """Return the implicit reward gap, and the target gap below it."""
    margins, target = stage.curve("rewards/margins"), stage.curve("rewards/target_gap")
    if not stage.is_preference or not margins:
        return Value()
    return Value(short(margins.end()), f"target {short(target.end())}" if target else "")


def _costs(runs: Sequence[RunResults]) -> list[FigureRow]:
    seconds = [sum(stage.record.seconds or 0.0 for stage in run.stages) for run in runs]
    memory = [max((s.record.peak_memory_bytes or 0 for s in run.stages), default=0) for run in runs]
    return [
        FigureRow("time", "total time", [Value(duration(value or None)) for value in seconds]),
        FigureRow("memory", "peak memory", [Value(size(value or None)) for value in memory]),
    ]


def _recipe(run: RunResults) -> Mapping[str, Any]:
    try:
        found = YAML(typ="safe", pure=True).load(run.recipe_text)
    except YAMLError:  # a note of the run says so
        return {}
    return found if isinstance(found, Mapping) else {}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return a recipe with dotted keys; list entries are named by their `name`, else by number."""
    if isinstance(value, Mapping) and value:
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = [(str(item.get("name", number)), item) for number, item in enumerate(value)]
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= _flat(item, f"{key}.{name}" if key else name)
    return found


def _system(stage: StageResults | None) -> dict[str, Any]:
    system = stage.record.system if stage is not None else None
    return {} if system is None else _flat(system.to_json(), "system")


def _differences(
    settings: Sequence[Mapping[str, Any]], folders: Sequence[Path]
) -> list[Difference]:
    keys = dict.fromkeys(key for own in settings for key in own)
    # The run directory, and the names of repeated stages, are not settings of a run.
    left_out = {"run_dir"} | {key for key in keys if key.endswith(".name")}
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key in keys:
        values = [own.get(key, _ABSENT) for own in settings]
        if key not in left_out and any(value != values[0] for value in values):
            shown = [_shown(value, folder) for value, folder in zip(values, folders, strict=True)]
            stage, _, rest = key.removeprefix("stages.").partition(".")
            one = (f".{rest}", stage) if key.startswith("stages.") and rest else (key, "")
            found.setdefault((one[0], tuple(shown)), []).append(one[1])
    return [Difference(_key(rest, stages), [*shown]) for (rest, shown), stages in found.items()]


def _key(rest: str, stages: Sequence[str]) -> str:
    """Return a key that several stages share with the same values, once."""
    if not rest.startswith("."):
        return rest
    names = stages[0] if len(stages) == 1 else f"{{{','.join(stages)}}}"
    return f"stages.{names}{rest}"


def _shown(value: Any, folder: Path) -> str:
    text = f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
    text = without_absolute_paths(text, folder)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
