"""The record of a stage in chain.json, written by the chain and read by resume, model card and report.

`StageRecord.from_json(entry)` raises if a value has another type; with `lenient=True`, for the report of a
damaged file, such values are skipped. `to_json` omits values that are None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rpo_trainer.data.counts import TruncatedResponses
from rpo_trainer.runtime.json_records import JsonRecord

CHAIN_FILE = "chain.json"
METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
State = Literal["pending", "running", "done"]
Reach = Literal["model", "tokenizer", "all"]  # which files of a directory are read
_NULL: dict[str, Any] = {"absent": None}
_EMPTY: dict[str, Any] = {"absent": {}}

# --- data ---


@dataclass
class FileRecord(JsonRecord):
    """A file that was read: its digest, and its stat, by which a change is detected (`known_digest`)."""

    digest: str
    stat: list[int] | None = None


@dataclass
class InputRecord(JsonRecord):
    """An input of a stage: its files by name, or its commit on the hub.

    Attributes:
        key: the recipe key that names it.
        name: its name in the recipe.
    """

    key: str
    name: str
    reach: Reach
    files: dict[str, FileRecord] | None = None
    commit: str | None = None


@dataclass
class ReasonRecord(JsonRecord):
    """Count of rows with one reason, and the first ids; `of`: total rows, None: the rows used."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    of: int | None = None


@dataclass
class DifferencesRecord(ReasonRecord):
    """Rows of a source whose prompts generation and training render differently."""

    example: list[str] | None = None
    text: str | None = None


@dataclass
class PairsRecord(JsonRecord):
    """Rewards and lengths of the best and worst response of each row."""

    rows: int = 0
    with_rewards: int = 0
    ties: int = 0
    reversed: int = 0
    gap: dict[str, float] = field(default_factory=dict)
    mean_characters_chosen: float | None = None
    mean_characters_rejected: float | None = None


@dataclass
class JudgeRecord(JsonRecord):
    """Consistency of a judge, see `data.judge_bias.biases`."""

    comparisons: int = 0
    consistent: int = 0
    equal: int = 0
    first_position: float | None = field(default=None, metadata=_NULL)
    longer_wins: float | None = field(default=None, metadata=_NULL)


@dataclass
class AuditRecord(JsonRecord):
    """Counts of a data set by source or reason, as in `Audit.as_dict()`."""

    read: dict[str, int] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: int | None = None
    dropped: dict[str, ReasonRecord] = field(default_factory=dict)
    warnings: dict[str, ReasonRecord] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    generation: dict[str, DifferencesRecord] = field(default_factory=dict)
    cut: dict[str, TruncatedResponses] = field(default_factory=dict)
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
    """The examples of a stage; `held_out` is the audit of its held-out data."""

    fingerprint: str | None = None
    audit: AuditRecord = field(default_factory=AuditRecord)
    held_out: AuditRecord | None = None


# --- training ---


@dataclass
class StepZeroRecord(JsonRecord):
    """The loss before the first update, and its expected value for policy = reference model."""

    loss: float | None = None
    expected: float | None = None
    nats_per_token: float | None = None
    ok: bool | None = None
    why: str | None = None


@dataclass
class WarningRecord(JsonRecord):
    """A warning during training."""

    text: str
    step: int | None = None
    name: str | None = None
    advice: str | None = None


@dataclass
class SkippedStepRecord(JsonRecord):
    """A skipped optimizer step: what was not finite, and the ids of its rows."""

    step: int
    what: str
    rows: list[str] = field(default_factory=list)


@dataclass
class CalibrationBin(JsonRecord):
    """A calibration bin of a reward model: mean prediction and mean observation."""

    predicted: float
    observed: float
    count: int = 0


Calibration = dict[str, list[CalibrationBin]]


@dataclass
class OutputRecord(JsonRecord):
    """The output of a stage in `final`.

    Attributes:
        dtype: of its weights, such as `bfloat16`.
        exact: fingerprint of the float32 weights that later stages start from; None: those of `final`.
    """

    fingerprint: str
    dtype: str | None = None
    exact: str | None = None


@dataclass
class HubRecord(JsonRecord):
    """The upload of an output to the hub: its commit, or the error."""

    repo: str
    commit: str | None = None
    error: str | None = None


# --- evaluation ---


@dataclass
class EstimateRecord(JsonRecord):
    """A mean and the bounds of its 95% confidence interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class SourceNLLRecord(EstimateRecord):
    """Negative log-likelihood per token of a data source, in nats."""

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
    """Metrics on held-out data after a stage; None if not measured.

    Attributes:
        nll, nll_before: loss on the stage's own held-out rows after and before it, in nats per token.
        baseline: the policy that responses are compared with; `of_baseline` has its metrics if no stage of
            the run produced it.
        exact: fraction of sampled responses with the verifier's maximum reward.
        unfinished: fraction of sampled responses truncated by `max_new_tokens`.
        measure: metrics of responses are comparable if this is equal.
        accuracy: pair accuracy of a reward model.
        agreement: metrics of a reward model by name, such as `pearson/NAME`.
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
    """A held-out prompt and responses to it, a line of `samples.jsonl`. `reward` is that of `sampled`.

    Attributes:
        rewards, tokens, log_ratios: of all sampled responses: reward, trained tokens, and
            log π − log π_baseline in nats, whose mean estimates the KL divergence from the baseline;
            None for a response that cannot be tokenized.
    """

    prompt: str | list[dict[str, Any]] = ""
    id: str | None = None
    ground_truth: str | None = None
    sampled: str | None = None
    reward: float | None = None
    greedy: str | None = None
    greedy_reward: float | None = None
    rewards: list[float | None] | None = None
    tokens: list[float | None] | None = None
    log_ratios: list[float | None] | None = None


@dataclass
class SystemRecord(JsonRecord):
    """The hardware and software that trained a stage.

    Attributes:
        devices: accelerators of all processes, or the CPU, with the number of each.
        cores: CPU cores of a process; `threads`: CPU threads that torch used.
        memory_bytes: memory of the host.
        launcher: what started the processes, such as torchrun.
        engine: how the processes share the work, such as DDP.
        precision: dtype of the arithmetic.
        libraries: versions by name.
    """

    devices: dict[str, int] = field(default_factory=dict)
    cores: int | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    platform: str | None = None
    launcher: str | None = None
    engine: str | None = None
    world_size: int | None = None
    precision: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)


@dataclass
class GapRecord(JsonRecord):
    """The implicit reward gap (β · log-ratio gap) and target gap of a training example after the stage.

    A line of `gaps.jsonl`.
    """

    implicit_gap: float
    target_gap: float | None = None
    id: str | None = None


# --- the stage ---


@dataclass
class StageRecord(JsonRecord):
    """The record of a stage in chain.json; None for values not known yet.

    Attributes:
        spec: the stage in the recipe, as plain data.
        sources: digest of each data file, by its path in the recipe.
        reward_scale: the fitted η, if `reward_scale` is `auto`.
        system: hardware and software of the last start of its training.
        eval_before, eval_after: metrics on the stage's own held-out examples.
        steps: optimizer steps, set when training is complete.
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
    system: SystemRecord | None = None
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
    """An allowed change of the recipe or of an input."""

    when: str
    key: str
    old: Any = field(metadata={"key": "from", **_NULL})
    new: Any = field(metadata={"key": "to", **_NULL})
