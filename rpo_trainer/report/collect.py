"""Read a run directory into `RunResults`, the input of tables, plots and verdicts.

An unfinished run, a truncated line or a missing file is not an error: `RunResults.notes` names whatever
could not be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rpo_trainer.errors import RunError
from rpo_trainer.recipe.rules.chain import PREFERENCE_KINDS
from rpo_trainer.report.formatting import counted
from rpo_trainer.report.scores import Agreement, EvalScores, read_agreement, read_scores
from rpo_trainer.runtime.files import digest_path, json_digest, verify_digest
from rpo_trainer.runtime.json_records import JsonRecord
from rpo_trainer.stages.record import (
    CHAIN_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    EvaluationRecord,
    GapRecord,
    SampleRecord,
    StageRecord,
)

LineRecord = TypeVar("LineRecord", bound=JsonRecord)


@dataclass(frozen=True)
class Curve:
    """One metric over optimizer steps: finite values only, `steps` increasing."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        """Whether there is at least one value."""
        return bool(self.values)

    def start(self) -> float:
        """Return the mean of the first tenth of the logged values (at least one)."""
        head = self.values[: max(1, len(self.values) // 10)]
        return sum(head) / len(head)

    def end(self) -> float:
        """Return the mean of the last tenth of the logged values (at least one)."""
        tail = self.values[-max(1, len(self.values) // 10) :]
        return sum(tail) / len(tail)


@dataclass
class StageResults:
    """The results of one stage.

    Attributes:
        record: its entry in chain.json.
        settings: the recipe's fields for the stage, defaults included.
        metrics: its log lines.
        samples: held-out prompts with the responses of its policy.
        gaps: implicit reward gap and target gap of some training examples, after the stage.
        before: the baseline, if it is a model from before the run.
    """

    record: StageRecord
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SampleRecord] = field(default_factory=list)
    gaps: list[GapRecord] = field(default_factory=list)
    before: StageResults | None = None

    def __post_init__(self) -> None:
        evaluation = self.record.eval or EvaluationRecord()
        self.scores: EvalScores = read_scores(evaluation)
        self.agreement: Agreement = read_agreement(evaluation)

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.record.name

    @property
    def kind(self) -> str:
        """`sft`, `dpo`, `rpo` or `reward`; `before` for a baseline from before the run."""
        return self.record.kind

    @property
    def is_preference(self) -> bool:
        """Whether the stage trains on preferences."""
        return self.kind in PREFERENCE_KINDS

    @property
    def samples_data(self) -> bool:
        """Whether its training responses were sampled in the run."""
        data = self.settings.get("data")
        given = data if isinstance(data, Mapping) else {}
        return any(given.get(field) is not None for field in ("generate", "responses_from"))

    def curve(self, name: str) -> Curve:
        """Return the finite values of the metric `name` by step; empty if it was never logged."""
        points: dict[int, float] = {}
        for row in self.metrics:
            value, step = _number(row.get(name)), row.get("step")
            if value is not None and isinstance(step, int):
                points[step] = value
        steps = sorted(points)
        return Curve(steps, [points[step] for step in steps])

    def delta(self, which: str) -> Curve:
        """Return log π − log π_ref of the `chosen` or `rejected` responses, nats per response.

        If it was not logged, it is the implicit reward divided by β; may be empty.
        """
        if logged := self.curve(f"logps/{which}_delta"):
            return logged
        beta, rewards = self.setting("beta"), self.curve(f"rewards/{which}")
        if not beta or not rewards:
            return Curve([], [])
        return Curve(rewards.steps, [value / beta for value in rewards.values])

    def non_finite_step(self) -> int | None:
        """Return the first logged step with a NaN or infinite loss."""
        for row in self.metrics:
            loss = row.get("loss")
            if isinstance(loss, float) and not math.isfinite(loss):
                return int(row.get("step") or 0)
        return None

    def setting(self, name: str) -> float | None:
        """Return a numeric recipe field of the stage, e.g. `beta`."""
        return _number(self.settings.get(name))


@dataclass
class RunResults:
    """A run: its stages in order, the text of the recipe, and notes on what could not be read."""

    name: str
    stages: list[StageResults]
    recipe_text: str
    notes: list[str]

    def stage(self, name: str | None) -> StageResults | None:
        """Return the stage of that name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def parent(self, stage: StageResults) -> StageResults | None:
        """Return the stage that `stage` started from; None if it started from the model or a path."""
        position, init = self.stages.index(stage), stage.record.init
        if init in (None, "previous"):
            return self.stages[position - 1] if position else None
        head = str(init).removesuffix("/final")
        return next((other for other in self.stages[:position] if other.name == head), None)

    def seed(self, stage: StageResults) -> StageResults | None:
        """Return what `stage` started from: another stage, or a measured baseline from before the run."""
        init = stage.record.init
        init = "model" if init in (None, "previous") else init
        own = stage.before if init == stage.scores.baseline else None
        return self.parent(stage) or own

    @property
    def compared(self) -> list[StageResults]:
        """Baselines from before the run, followed by all stages."""
        found = {s.before.name: s.before for s in reversed(self.stages) if s.before is not None}
        return [*found.values(), *self.stages]

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return bool(self.stages) and all(stage.record.state == "done" for stage in self.stages)


def collect_run(run_dir: Path) -> RunResults:
    """Read a run directory.

    Raises:
        RunError: `run_dir` holds neither `chain.json` nor `metrics.jsonl`.
    """
    if not (run_dir / CHAIN_FILE).is_file() and not (run_dir / METRICS_FILE).is_file():
        raise RunError(
            "not a run directory: it has no chain.json and no metrics.jsonl"
            if run_dir.is_dir()
            else "no such run directory",
            code="run.not-a-run-directory",
            where=str(run_dir),
            fix="pass a directory written by `rpo-trainer run` (its --run-dir)",
        )
    notes: list[str] = []
    recipe_text, recipe = _read_recipe(run_dir / RECIPE_FILE, notes)
    stages = [StageResults(record) for record in _read_chain(run_dir / CHAIN_FILE, notes)]
    by_name = {stage.name: stage for stage in stages}
    for row in _read_lines(run_dir / METRICS_FILE, notes):
        name = str(row.get("stage", "run"))
        if name not in by_name:
            record = StageRecord(name=name, kind=_kind_of_metrics(row), state="running")
            by_name[name] = StageResults(record)
            stages.append(by_name[name])
        by_name[name].metrics.append(row)
    for stage in stages:
        stage.settings = _stage_settings(recipe, stage.name)
        folder = run_dir / stage.name
        stage.samples = _read_records(SampleRecord, folder / "samples.jsonl", notes)
        stage.gaps = _read_records(GapRecord, folder / "gaps.jsonl", notes)
        stage.before = _before(stage.record.eval)
        samples = _read_records(SampleRecord, folder / "baseline-samples.jsonl", notes)
        if stage.before is not None:
            stage.before.samples = samples
    return RunResults(run_dir.resolve().name, stages, recipe_text, notes)


def _read_chain(path: Path, notes: list[str]) -> list[StageRecord]:
    if not path.is_file():
        notes.append("chain.json is missing; the stages are taken from metrics.jsonl")
        return []
    try:
        chain = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        notes.append(
            f"chain.json cannot be read ({error}); the stages are taken from metrics.jsonl"
        )
        return []
    content = dict(chain) if isinstance(chain, dict) else {}
    if content.pop("digest", None) not in (None, json_digest(content)):
        notes.append("chain.json is corrupt: its content does not match its digest")
    entries = content.get("stages")
    return [
        StageRecord.from_json(entry if isinstance(entry, dict) else {}, lenient=True)
        for entry in (entries if isinstance(entries, list) else [])
    ]


def _before(evaluation: EvaluationRecord | None) -> StageResults | None:
    """Return the baseline as a stage that has only held-out figures."""
    if evaluation is None or evaluation.of_baseline is None or evaluation.baseline is None:
        return None
    name = f"{Path(evaluation.baseline).name}, before"
    figures = evaluation.of_baseline
    return StageResults(StageRecord(name=name, kind="before", state="done", eval=figures))


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        found = YAML(typ="safe", pure=True).load(text)
        return text, found if isinstance(found, Mapping) else {}
    except FileNotFoundError:
        notes.append("recipe.yaml is missing; settings are not shown")
    except (YAMLError, ValueError, OSError) as error:
        notes.append(f"recipe.yaml cannot be read ({type(error).__name__}); settings are not shown")
    return "", {}


def _stage_settings(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the recipe fields of a stage; `rpo-2` of a repeated stage `rpo` has those of `rpo`."""
    entries, defaults = recipe.get("stages"), recipe.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, Mapping):
            continue
        own = str(entry.get("name", ""))
        repeated = (_number(entry.get("repeat")) or 1) > 1
        if own == name or (repeated and re.fullmatch(re.escape(own) + r"-\d+", name)):
            return {**(defaults if isinstance(defaults, Mapping) else {}), **entry}
    return {}


def _read_records(kind: type[LineRecord], path: Path, notes: list[str]) -> list[LineRecord]:
    """Yield the records of an optional JSONL file of a stage; lines that do not fit are skipped."""

    def read() -> Iterator[LineRecord]:
        for row in _read_lines(path, notes, optional=True):
            try:
                yield kind.from_json(row, lenient=True)
            except ValueError:
                continue

    return list(read())


def _read_lines(path: Path, notes: list[str], optional: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; other lines are counted in `notes`."""
    if not path.is_file():
        if not optional:
            notes.append(f"{path.name} is missing")
        return []
    rows: list[dict[str, Any]] = []
    bad = 0
    if digest_path(path).is_file() and (fault := verify_digest(path)) is not None:
        notes.append(f"{path.parent.name}/{path.name} is corrupt ({fault}) and was skipped")
        return []
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a truncated last line, or bytes that are not UTF-8
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        place = f"{path.parent.name}/{path.name}" if optional else path.name
        notes.append(f"{place}: {counted(bad, 'line')} could not be read")
    return rows


def _number(value: Any) -> float | None:
    """Return `value` as a finite float; None for anything else (text, bool, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _kind_of_metrics(row: Mapping[str, Any]) -> str:
    """Guess the kind of a stage from its metrics."""
    if "loss/bradley_terry" in row or "loss/regression" in row:
        return "reward"
    if "rewards/target_gap" in row:
        return "rpo"
    return "dpo" if "loss/preference" in row or "rewards/margins" in row else "sft"
