"""Run directory → plain records that the tables, plots and verdicts are made from.

A run that is unfinished, was killed in the middle of a line or lacks a file still gives a
`RunRecord`; what could not be read is named in its `notes`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rpo_trainer.errors import RunError
from rpo_trainer.report.agreement import Agreement, read_agreement
from rpo_trainer.report.audits import AuditRecord, read_audit
from rpo_trainer.report.scores import EvalScores, read_scores
from rpo_trainer.report.values import count, mapping, number
from rpo_trainer.runtime.files import digest_path, json_digest, verify_digest

PREFERENCE_KINDS = ("dpo", "rpo")


@dataclass(frozen=True)
class Curve:
    """One metric over optimizer steps; only finite values, `steps` rising."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.values)

    def start(self) -> float:
        """Mean of the first tenth of the logged values (at least one)."""
        head = self.values[: max(1, len(self.values) // 10)]
        return sum(head) / len(head)

    def end(self) -> float:
        """Mean of the last tenth of the logged values (at least one); less noisy than the last."""
        tail = self.values[-max(1, len(self.values) // 10) :]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class StepZero:
    """The loss before the first update, and the constant that policy = reference must give."""

    loss: float | None
    expected: float | None
    ok: bool | None


@dataclass(frozen=True)
class Sample:
    """A fixed prompt and a policy's answers to it; `reward` is that of the sampled one."""

    prompt: str
    ground_truth: str | None
    greedy: str | None
    greedy_reward: float | None
    sampled: str | None
    reward: float | None


@dataclass(frozen=True)
class Said:
    """A warning given while the stage trained."""

    step: int | None
    text: str
    advice: str | None


@dataclass(frozen=True)
class Gap:
    """One example: β times the difference of log-ratios, and η times that of the given rewards."""

    implicit: float
    target: float | None


@dataclass
class StageRecord:
    """All that a run directory tells about one stage."""

    name: str
    kind: str
    state: str = "pending"
    init: str | None = None
    reference: str | None = None
    seconds: float | None = None
    examples: int | None = None
    steps: int | None = None
    tokens: int | None = None
    peak_memory_bytes: int | None = None
    data_fingerprint: str | None = None
    sources: dict[str, str] = field(default_factory=dict)  # data files and their hashes
    output_fingerprint: str | None = None
    audit: AuditRecord = field(default_factory=AuditRecord)
    held_out: AuditRecord = field(default_factory=AuditRecord)  # of the stage's own evaluation
    step0: StepZero | None = None
    scores: EvalScores = field(default_factory=EvalScores)
    agreement: Agreement = field(default_factory=Agreement)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    before: StageRecord | None = None  # the baseline, where no stage of the run made it
    gaps: list[Gap] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    hub: dict[str, str] = field(default_factory=dict)  # `repo`, and its `commit` or the `error`

    @property
    def is_preference(self) -> bool:
        """Whether the stage trains on preferences, so that it has a reference and gaps."""
        return self.kind in PREFERENCE_KINDS

    @property
    def samples_data(self) -> bool:
        """Whether its responses were sampled in the run."""
        data = mapping(self.settings.get("data"))
        return any(data.get(field) is not None for field in ("generate", "responses_from"))

    def curve(self, name: str) -> Curve:
        """The finite values of the metric `name`, by step; empty where it was never logged."""
        points: dict[int, float] = {}
        for row in self.metrics:
            value, step = number(row.get(name)), row.get("step")
            if value is not None and isinstance(step, int):
                points[step] = value
        steps = sorted(points)
        return Curve(steps, [points[step] for step in steps])

    def non_finite_step(self) -> int | None:
        """The first logged step whose loss is NaN or infinite."""
        for row in self.metrics:
            loss = row.get("loss")
            if isinstance(loss, float) and not math.isfinite(loss):
                return int(row.get("step") or 0)
        return None

    def setting(self, name: str) -> float | None:
        """A number that the recipe gives this stage, e.g. `beta`."""
        return number(self.settings.get(name))


@dataclass
class RunRecord:
    """A whole run: its stages in order, the recipe's text, and what could not be read."""

    name: str
    stages: list[StageRecord]
    recipe_text: str
    notes: list[str]

    def stage(self, name: str | None) -> StageRecord | None:
        """The stage of that name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def parent(self, stage: StageRecord) -> StageRecord | None:
        """The stage whose output seeded `stage`; None where that was the model or a path."""
        position = self.stages.index(stage)
        if stage.init in (None, "previous"):
            return self.stages[position - 1] if position else None
        head = str(stage.init).removesuffix("/final")
        return next((other for other in self.stages[:position] if other.name == head), None)

    def seed(self, stage: StageRecord) -> StageRecord | None:
        """What seeded `stage`, with its figures: another stage, or a baseline from before the run."""
        init = "model" if stage.init in (None, "previous") else stage.init
        own = stage.before if init == stage.scores.baseline else None
        return self.parent(stage) or own

    @property
    def compared(self) -> list[StageRecord]:
        """What the stages are compared with, where no stage made it, and all stages."""
        found = {s.before.name: s.before for s in reversed(self.stages) if s.before is not None}
        return [*found.values(), *self.stages]

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return bool(self.stages) and all(stage.state == "done" for stage in self.stages)


def collect_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RunError: `run_dir` holds neither `chain.json` nor `metrics.jsonl`.
    """
    if not (run_dir / "chain.json").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise RunError(
            "not a run directory: it has no chain.json and no metrics.jsonl",
            where=str(run_dir),
            why="what is shown is read from them",
            fix="name the directory that `rpo-trainer run` wrote (its --run-dir)",
        )
    notes: list[str] = []
    recipe_text, recipe = _read_recipe(run_dir / "recipe.yaml", notes)
    stages = [_stage_from_chain(entry) for entry in _read_chain(run_dir / "chain.json", notes)]
    by_name = {stage.name: stage for stage in stages}
    for row in _read_lines(run_dir / "metrics.jsonl", notes):
        name = str(row.get("stage", "run"))
        if name not in by_name:
            by_name[name] = StageRecord(name=name, kind=_guess_kind(row), state="running")
            stages.append(by_name[name])
        by_name[name].metrics.append(row)
    for stage in stages:
        stage.settings = _stage_settings(recipe, stage.name)
        folder = run_dir / stage.name
        samples = _read_lines(folder / "samples.jsonl", notes, optional=True)
        stage.samples = [_sample(row) for row in samples] or stage.samples
        before = _read_lines(folder / "baseline-samples.jsonl", notes, optional=True)
        if stage.before is not None:
            stage.before.samples = [_sample(row) for row in before]
        stage.gaps = list(_gaps(_read_lines(folder / "gaps.jsonl", notes, optional=True)))
    return RunRecord(run_dir.resolve().name, stages, recipe_text, notes)


def _read_chain(path: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    if not path.is_file():
        notes.append("chain.json is absent: the stages are those found in metrics.jsonl")
        return []
    try:
        chain = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        notes.append(
            f"chain.json cannot be read ({error}): the stages are those found in metrics.jsonl"
        )
        return []
    content = dict(mapping(chain))
    if content.pop("digest", None) not in (None, json_digest(content)):
        notes.append("chain.json is damaged: its content does not match its digest")
    stages = content.get("stages")
    return [mapping(entry) for entry in stages] if isinstance(stages, list) else []


def _stage_from_chain(entry: Mapping[str, Any]) -> StageRecord:
    data, step0 = mapping(entry.get("data")), mapping(entry.get("step0"))
    evaluation, ok = mapping(entry.get("eval")), step0.get("ok")
    return StageRecord(
        name=str(entry.get("name", "?")),
        kind=str(entry.get("kind", "?")),
        state=str(entry.get("state", "pending")),
        init=_text(entry.get("init")),
        reference=_text(entry.get("reference")),
        seconds=number(entry.get("seconds")),
        examples=count(entry.get("examples")),
        steps=count(entry.get("steps")),
        tokens=count(entry.get("tokens")),
        peak_memory_bytes=count(entry.get("peak_memory_bytes")),
        data_fingerprint=_text(data.get("fingerprint")),
        sources={str(name): str(key) for name, key in mapping(entry.get("sources")).items()},
        output_fingerprint=_text(mapping(entry.get("output")).get("fingerprint")),
        audit=read_audit(mapping(data.get("audit"))),
        held_out=read_audit(mapping(data.get("held_out"))),
        step0=StepZero(
            number(step0.get("loss")),
            number(step0.get("expected")),
            ok if isinstance(ok, bool) else None,
        )
        if step0
        else None,
        scores=read_scores(evaluation),
        agreement=read_agreement(evaluation),
        before=_before(evaluation),
        samples=[_sample(mapping(row)) for row in evaluation.get("samples") or ()],
        said=list(_said(entry.get("warnings"))),
        hub={key: str(value) for key, value in mapping(entry.get("hub")).items()},
    )


def _before(evaluation: Mapping[str, Any]) -> StageRecord | None:
    """The baseline as a stage that has nothing but its figures."""
    figures, name = mapping(evaluation.get("of_baseline")), _text(evaluation.get("baseline"))
    if not figures or name is None:
        return None
    return StageRecord(
        f"{Path(name).name}, before", kind="before", state="done", scores=read_scores(figures)
    )


def _said(warnings: Any) -> Iterator[Said]:
    for raw in warnings if isinstance(warnings, list) else ():
        entry = mapping(raw)
        if (text := _text(entry.get("text"))) is not None:
            yield Said(count(entry.get("step")), text, _text(entry.get("advice")))


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, mapping(YAML(typ="safe", pure=True).load(text))
    except FileNotFoundError:
        notes.append("recipe.yaml is absent: settings are not shown")
    except (YAMLError, ValueError, OSError) as error:
        notes.append(f"recipe.yaml cannot be read ({type(error).__name__}): settings are not shown")
    return "", {}


def _stage_settings(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The recipe's fields for a stage; `rpo-2` of a repeated stage `rpo` has those of `rpo`."""
    entries = recipe.get("stages")
    for entry in entries if isinstance(entries, list) else []:
        found = mapping(entry)
        own = str(found.get("name", ""))
        repeated = (count(found.get("repeat")) or 1) > 1
        if own == name or (repeated and re.fullmatch(re.escape(own) + r"-\d+", name)):
            return {**mapping(recipe.get("defaults")), **found}
    return {}


def _read_lines(path: Path, notes: list[str], optional: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSONL file; lines that are not JSON objects are counted in `notes`."""
    if not path.is_file():
        if not optional:
            notes.append(f"{path.name} is absent")
        return []
    rows: list[dict[str, Any]] = []
    bad = 0
    if digest_path(path).is_file() and (fault := verify_digest(path)) is not None:
        notes.append(f"{path.parent.name}/{path.name} is damaged ({fault}) and left out")
        return []
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a cut last line, or bytes that are not UTF-8
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        place = f"{path.parent.name}/{path.name}" if optional else path.name
        notes.append(f"{place}: {bad} line{'s' if bad > 1 else ''} could not be read and left out")
    return rows


def _sample(row: Mapping[str, Any]) -> Sample:
    sampled = row.get("sampled")
    # Of several sampled answers the first stands for all.
    first = sampled[0] if isinstance(sampled, list) and sampled else sampled
    return Sample(
        prompt=_text(row.get("prompt")) or "",
        ground_truth=_text(row.get("ground_truth")),
        greedy=_text(row.get("greedy")),
        greedy_reward=number(row.get("greedy_reward")),
        sampled=_text(first),
        reward=number(row.get("reward")),
    )


def _gaps(rows: list[dict[str, Any]]) -> Iterator[Gap]:
    for row in rows:
        implicit = number(row.get("implicit_gap"))
        if implicit is not None:
            yield Gap(implicit, number(row.get("target_gap")))


def _text(value: Any) -> str | None:
    """A value as text; a list of messages as `role: content` lines."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = (
            f"{item.get('role', '?')}: {item.get('content', '')}"
            if isinstance(item, dict)
            else str(item)
            for item in value
        )
        return "\n".join(parts)
    return str(value)


def _guess_kind(row: Mapping[str, Any]) -> str:
    """The kind of a stage that only metrics.jsonl knows."""
    if "loss/bradley_terry" in row or "loss/regression" in row:
        return "reward"
    if "rewards/target_gap" in row:
        return "rpo"
    return "dpo" if "loss/preference" in row or "rewards/margins" in row else "sft"
