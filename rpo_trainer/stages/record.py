"""The record of a stage in chain.json: what the chain writes, and what resume, card and report read.

`StageRecord.from_json(entry)` refuses an entry that does not have these types; with `lenient=True`, for the
report of a damaged file, whatever does not fit is left out. `to_json` leaves out what is None.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rpo_trainer.data.counts import CutResponses

_Record = TypeVar("_Record", bound="JsonRecord")

CHAIN_FILE = "chain.json"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
State = Literal["pending", "running", "done"]
Reach = Literal["model", "tokenizer", "all"]  # which files of a directory are read
_NULL: dict[str, Any] = {"absent": None}
_EMPTY: dict[str, Any] = {"absent": {}}


class JsonRecord:
    """Base of dataclasses that stand in a JSON file.

    Metadata of fields: `key`, its name in the file; `absent`, what stands there where it is None (without
    it the key is left out); `rest`, it holds the entries that no other field names.
    """

    @classmethod
    def from_json(cls: type[_Record], value: Any, *, lenient: bool = False) -> _Record:
        """The record of what `json.loads` has read.

        Args:
            lenient: what does not have its type, or is not finite, is left out.

        Raises:
            ValueError: an entry does not have its type, or a required one is missing.
        """
        found: _Record = _read(cls, value, cls.__name__, lenient)
        return found

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, texts and numbers, for `json.dumps`."""
        plain: dict[str, Any] = _plain(self)
        return plain


# --- data ---


@dataclass
class FileRecord(JsonRecord):
    """A file as it was read: its digest, and what tells that it is still the same (`known_digest`)."""

    digest: str
    stat: list[int] | None = None


@dataclass
class InputRecord(JsonRecord):
    """An input of a stage: its files by name, or its commit on the hub.

    Attributes:
        key: of the recipe, where it is named.
        name: as the recipe names it.
    """

    key: str
    name: str
    reach: Reach
    files: dict[str, FileRecord] | None = None
    commit: str | None = None


@dataclass
class ReasonRecord(JsonRecord):
    """Rows of one reason, and the ids of the first; `of`: among how many, None: those that are used."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    of: int | None = None


@dataclass
class DifferencesRecord(ReasonRecord):
    """Rows of a source that generation and training render differently."""

    example: list[str] | None = None
    text: str | None = None


@dataclass
class PairsRecord(JsonRecord):
    """Rewards and lengths of the pairs, best and worst response of each."""

    rows: int = 0
    with_rewards: int = 0
    ties: int = 0
    reversed: int = 0
    gap: dict[str, float] = field(default_factory=dict)
    mean_characters_chosen: float | None = None
    mean_characters_rejected: float | None = None


@dataclass
class JudgeRecord(JsonRecord):
    """How consistent a judge is, see `data.judge_bias.biases`."""

    comparisons: int = 0
    consistent: int = 0
    equal: int = 0
    first_position: float | None = field(default=None, metadata=_NULL)
    longer_wins: float | None = field(default=None, metadata=_NULL)


@dataclass
class AuditRecord(JsonRecord):
    """The counts of a data set, `Audit.as_dict()`: by source, or by reason."""

    read: dict[str, int] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: int | None = None
    dropped: dict[str, ReasonRecord] = field(default_factory=dict)
    warnings: dict[str, ReasonRecord] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    generation: dict[str, DifferencesRecord] = field(default_factory=dict)
    cut: dict[str, CutResponses] = field(default_factory=dict)
    extra_columns: dict[str, list[str]] = field(default_factory=dict)
    unread_columns: dict[str, list[str]] = field(default_factory=dict)
    pairs: PairsRecord | None = field(default=None, metadata=_EMPTY)
    filter: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    judge: JudgeRecord | None = field(default=None, metadata=_EMPTY)
    replay: dict[str, Any] = field(default_factory=dict)
    ratings: dict[str, dict[str, float]] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)
    max_length: int | None = field(default=None, metadata=_NULL)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class DataRecord(JsonRecord):
    """The examples of a stage; `held_out`: the audit of those it is evaluated with."""

    fingerprint: str | None = None
    audit: AuditRecord = field(default_factory=AuditRecord)
    held_out: AuditRecord | None = None


# --- training ---


@dataclass
class StepZeroRecord(JsonRecord):
    """The loss before the first update, and the constant that policy = reference must give."""

    loss: float | None = None
    expected: float | None = None
    nats_per_token: float | None = None
    ok: bool | None = None
    why: str | None = None


@dataclass
class WarningRecord(JsonRecord):
    """A warning given while the stage trained."""

    text: str
    step: int | None = None
    name: str | None = None
    advice: str | None = None


@dataclass
class SkippedStepRecord(JsonRecord):
    """A step that was left out: what was not finite, and the ids of its rows."""

    step: int
    what: str
    rows: list[str] = field(default_factory=list)


@dataclass
class CalibrationBin(JsonRecord):
    """Predictions of a reward model that are near each other, and what was observed."""

    predicted: float
    observed: float
    count: int = 0


Calibration = dict[str, list[CalibrationBin]]


@dataclass
class OutputRecord(JsonRecord):
    """What a stage has written into `final`."""

    fingerprint: str


@dataclass
class HubRecord(JsonRecord):
    """Where the output was to be uploaded, and its commit, or why it is not there."""

    repo: str
    commit: str | None = None
    error: str | None = None


# --- evaluation ---


@dataclass
class EstimateRecord(JsonRecord):
    """A mean and the bounds of its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class SourceNLLRecord(EstimateRecord):
    """Negative log-likelihood a token of a source, in nats."""

    rows: int | None = None


@dataclass
class TaskFigureRecord(EstimateRecord):
    """A metric of an lm-eval task."""

    higher_is_better: bool | None = field(default=None, metadata=_NULL)


@dataclass
class PreferencesRecord(JsonRecord):
    """How a policy ranks held-out responses, see `rewards.evaluate.preference_figures`."""

    pairs: int = 0
    ranked: EstimateRecord | None = None
    accuracy: EstimateRecord | None = None
    margin: EstimateRecord | None = None
    chosen_delta: EstimateRecord | None = None


@dataclass
class EvaluationRecord(JsonRecord):
    """Held-out figures after a stage; None for what was not measured.

    Attributes:
        nll, nll_before: of the stage's own held-out rows, after and before it, in nats.
        baseline: what its responses are compared with; `of_baseline` has the figures of one from before
            the run.
        exact: share of sampled responses with the verifier's largest reward.
        unfinished: share of sampled responses cut by `max_new_tokens`.
        measure: figures of responses compare where this is the same.
        accuracy: of a reward model, the share of pairs whose better response has the higher reward.
        agreement: of a reward model, `pearson/NAME` and others by metric.
    """

    nll: float | None = None
    nll_before: float | None = None
    baseline: str | None = None
    prompts: int | None = None
    responses: int | None = None
    reward_mean: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None
    exact: float | None = None
    unfinished: float | None = None
    greedy_reward_mean: float | None = None
    greedy_exact: float | None = None
    scorer: str | None = None
    measure: str | None = None
    win_rate: EstimateRecord | None = None
    undecided: int | None = None
    judge: JudgeRecord | None = None
    preferences: PreferencesRecord | None = None
    nll_by_source: dict[str, SourceNLLRecord] | None = None
    lm_eval: dict[str, dict[str, TaskFigureRecord]] | None = None
    of_baseline: EvaluationRecord | None = None
    accuracy: float | None = None
    calibration: Calibration | None = None
    agreement: dict[str, float] = field(default_factory=dict, metadata={"rest": True})


@dataclass
class SampleRecord(JsonRecord):
    """A held-out prompt and a policy's answers; a line of `samples.jsonl`. `reward` is of `sampled`."""

    prompt: str | list[dict[str, Any]] = ""
    id: str | None = None
    ground_truth: str | None = None
    sampled: str | None = None
    reward: float | None = None
    greedy: str | None = None
    greedy_reward: float | None = None


@dataclass
class GapRecord(JsonRecord):
    """A training example after the stage: β times the difference of log-ratios, and its target gap.

    A line of `gaps.jsonl`.
    """

    implicit_gap: float
    target_gap: float | None = None
    id: str | None = None


# --- the stage ---


@dataclass
class StageRecord(JsonRecord):
    """Everything that chain.json says of a stage; None for what has not come yet.

    Attributes:
        spec: the stage of the recipe as plain data.
        sources: digest of each data file, by its path as written.
        reward_scale: where it was fitted to the data.
        eval_before, eval_after: metrics of the stage's own held-out examples.
        steps: where it has trained to its end.
    """

    name: str = "?"
    kind: str = "?"
    state: State = "pending"
    init: str | None = field(default=None, metadata=_NULL)
    reference: str | None = field(default=None, metadata=_NULL)
    spec: dict[str, Any] = field(default_factory=dict)
    inputs: list[InputRecord] | None = None
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    examples: int | None = None
    sources: dict[str, str] | None = None
    data: DataRecord | None = None
    reward_scale: float | None = None
    step0: StepZeroRecord | None = None
    warnings: list[WarningRecord] | None = None
    skipped: list[SkippedStepRecord] | None = None
    eval_before: dict[str, float] | None = None
    eval_after: dict[str, float] | None = None
    steps: int | None = None
    peak_memory_bytes: int | None = None
    calibration: Calibration | None = None
    eval: EvaluationRecord | None = None
    output: OutputRecord | None = None
    hub: HubRecord | None = None


@dataclass
class ChangeRecord(JsonRecord):
    """A change of the recipe, or of an input, that was allowed."""

    when: str
    key: str
    old: Any = field(metadata={"key": "from", **_NULL})
    new: Any = field(metadata={"key": "to", **_NULL})


# --- reading and writing ---


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _keys(kind: Any) -> Iterator[tuple[str, Any]]:
    """Of each field but `rest` its key in the file."""
    for one in fields(kind):
        if not one.metadata.get("rest"):
            yield one.metadata.get("key", one.name), one


def _read(hint: Any, value: Any, place: str, lenient: bool) -> Any:
    """`value` where it is what `hint` says; raises ValueError where it is not."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(args, value, place, lenient)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _read_fields(hint, value, place, lenient)
    if origin is list and isinstance(value, (list, tuple)):
        found = (_try(args[0], v, f"{place}.{i}", lenient) for i, v in enumerate(value))
        return [item for fits, item in found if fits]
    if origin is dict and isinstance(value, Mapping):
        named = ((str(k), _try(args[1], v, f"{place}.{k}", lenient)) for k, v in value.items())
        return {name: item for name, (fits, item) in named if fits}
    if origin is Literal and value in args:
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number and (math.isfinite(value) or not lenient):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    if hint is int and number and isinstance(value, int):
        return value
    raise ValueError(f"{place} is {value!r:.40}, which is not {_name(hint)}")


def _read_union(args: tuple[Any, ...], value: Any, place: str, lenient: bool) -> Any:
    others = [one for one in args if one is not types.NoneType]
    if types.NoneType in args and value is None:
        return None
    for one in others[:-1]:
        fits, found = _try(one, value, place, True)
        if fits:
            return found
    return _read(others[-1], value, place, lenient)


def _try(hint: Any, value: Any, place: str, lenient: bool) -> tuple[bool, Any]:
    """Whether `value` fits, and what was read; what does not fit is an error unless `lenient`."""
    try:
        return True, _read(hint, value, place, lenient)
    except ValueError:
        if not lenient:
            raise
        return False, None


def _read_fields(kind: Any, value: Mapping[str, Any], place: str, lenient: bool) -> Any:
    hints, found, keys = _hints(kind), {}, dict(_keys(kind))
    for key, one in keys.items():
        if key in value and not (value[key] == {} == one.metadata.get("absent")):
            fits, item = _try(hints[one.name], value[key], f"{place}.{key}", lenient)
            if fits:
                found[one.name] = item
    for one in fields(kind):
        if one.metadata.get("rest"):
            others = {key: item for key, item in value.items() if key not in keys}
            found[one.name] = _read(hints[one.name], others, place, True)
    try:
        return kind(**found)
    except TypeError as error:
        raise ValueError(f"{place} is incomplete: {error}") from error


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for one in fields(value):
            item = getattr(value, one.name)
            if one.metadata.get("rest"):
                found |= _plain(item)
            elif item is not None or "absent" in one.metadata:
                found[one.metadata.get("key", one.name)] = (
                    _plain(item) if item is not None else one.metadata["absent"]
                )
        return found
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
