"""The inputs of one stage, and the rules of each kind: which rows it needs and how they become examples.

`StagePreparer` reads the data and returns a `StageInputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rpo_trainer.data import Audit, filter_rows, hold_out, rating_targets, tokenize_rows
from rpo_trainer.data.counts import EVAL_ROWS, HELD_OUT
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.data.example_view import ExampleView
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import (
    RewardStage,
    RPOStage,
    SFTStage,
    Stage,
)
from rpo_trainer.rewards.verifiers import VERIFIERS

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from rpo_trainer.data.rows import Row
    from rpo_trainer.recipe import DataSpec, EvalSpec, Recipe, ScoreSpec
    from rpo_trainer.recipe.schema import FilterSpec


@dataclass
class HeldOut:
    """Held-out data of a stage: tokenized examples, and their audit."""

    examples: datasets.Dataset
    audit: Audit


@dataclass
class StageInputs:
    """The data that a stage trains on.

    Attributes:
        stage: the stage; with `reward_scale: auto`, its value is the fitted one.
        audit: counts of rows read and dropped, and warnings.
        prompts: the prompts to train on, if responses are still to be sampled.
        held_out_prompts: those of them that `data.eval_fraction` holds out; None: it is not set.
        train: tokenized examples; None: not tokenized, or without responses yet.
        held_out: data for the evaluation during training; None: none.
        fingerprint: content key of the training examples, in order.
    """

    stage: Stage
    audit: Audit
    prompts: list[Row] = field(default_factory=list, repr=False)
    held_out_prompts: list[Row] | None = field(default=None, repr=False)
    train: datasets.Dataset | None = None
    held_out: HeldOut | None = None
    fingerprint: str = ""


@dataclass
class ScoredData:
    """Rows that a run has sampled or scored.

    Attributes:
        digest: of the file they are kept in.
        audit: counts of the rows read, and the biases of a judge.
    """

    rows: list[Row] = field(repr=False)
    digest: str
    audit: Audit


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """Return the digest of tokens, masks, and rewards or ratings, see `ExampleView.fingerprint`."""
    return ExampleView(dataset).fingerprint()


# --- rules by kind of stage ---


def stage_seed(stage: Stage, recipe: Recipe) -> int:
    """Return the stage's seed, else the recipe's."""
    return recipe.seed if stage.seed is None else stage.seed


def evaluation_of(stage: Stage, recipe: Recipe) -> tuple[str, EvalSpec] | None:
    """Return the evaluation after a stage, preceded by its key in the recipe; None: there is none.

    A reward model is evaluated on its held-out pairs and ratings instead.
    """
    if stage.trains_reward_model:
        return None
    if stage.eval is not None:
        return f"stages.{stage.name}.eval", stage.eval
    return None if recipe.eval is None else ("eval", recipe.eval)


def row_kind(stage: Stage) -> Literal["sft", "pair", "rating"]:
    """Return the kind of rows that a stage trains on."""
    if isinstance(stage, RewardStage) and stage.objective == "regression":
        return "rating"
    return "sft" if isinstance(stage, SFTStage) else "pair"


def needs_rewards(stage: Stage) -> bool:
    """Whether the loss of a stage needs a reward for every response."""
    margin = isinstance(stage, RewardStage) and stage.margin_scale > 0
    return isinstance(stage, RPOStage) or margin


def needs_policy(data: DataSpec) -> bool:
    """Whether responses are sampled during the run."""
    return data.generate is not None or data.responses_from is not None


def scored_before_run(score: ScoreSpec | None) -> bool:
    """Whether the rows can be scored before a run: by a verifier that is fast and runs no code."""
    return score is not None and score.verifier not in (None, "asserts")


def scorer_columns(score: ScoreSpec | None) -> tuple[str, ...]:
    """Return the columns that scoring reads besides prompt and responses."""
    if score is None or score.verifier is None:
        return ()
    return VERIFIERS[score.verifier].columns


def sampling_spec(data: DataSpec, stages: Sequence[Stage]) -> DataSpec:
    """Return `data`, or the data of the stage whose responses it uses (`responses_from`)."""
    while data.responses_from is not None:
        data = next(stage.data for stage in stages if stage.name == data.responses_from)
    return data


def sources_of_rows(data: DataSpec) -> dict[str, str]:
    """Return the sources that a stage's rows depend on, by field, in the form of `init`."""
    found = {}
    if data.responses_from is not None:
        found["responses_from"] = data.responses_from
    if data.score is not None and data.score.model is not None:
        found["score.model"] = data.score.model
    for number, name in enumerate(data.generate.policies if data.generate is not None else ()):
        found[f"generate.policies.{number}"] = name
    return found


# --- preparation steps that read no files ---


def fitted_stage(stage: Stage, audit: Audit) -> Stage:
    """Return the stage with the fitted η, if `reward_scale` is `auto`."""
    if not audit.calibration:
        return stage
    return stage.model_copy(update={"reward_scale": audit.calibration["reward_scale"]})


def tokenize_stage(
    stage: Stage,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
    folder: Path | None = None,
    label: str = "",
) -> datasets.Dataset:
    """Tokenize the rows of a stage, into a directory if there is one; see `tokenize_rows`."""
    return tokenize_rows(
        rows,
        tokenizer,
        kind=row_kind(stage),
        max_length=stage.max_length,
        truncation=stage.truncation,
        audit=audit,
        refuse_special_text=True,
        all_end=stage.trains_reward_model,
        folder=folder,
        label=label,
    )


def with_targets(stage: RewardStage, rows: list[Row], audit: Audit) -> list[Row]:
    """Return rated rows with the ratings that the stage is trained on."""
    assert stage.attributes is not None  # the schema
    bounds = None if stage.rating_range is None else (stage.rating_range[0], stage.rating_range[1])
    return rating_targets(rows, stage.attributes, rating_range=bounds, audit=audit)


def held_out_prompts(stage: Stage, rows: Sequence[Row], *, seed: int) -> frozenset[bytes] | None:
    """Return the keys of the prompts that `data.eval_fraction` holds out; None if it is not set.

    Args:
        rows: as read, before any is dropped for its rewards: so the same prompts are held out before a
            run, when their responses are still to be sampled, and regardless of the filter.
    """
    fraction = stage.data.eval_fraction
    if fraction is None or not rows:
        return None
    return frozenset(map(prompt_key, hold_out(rows, fraction, seed=seed)[1]))


def set_aside(
    rows: list[Row], prompts: frozenset[bytes] | None, audit: Audit
) -> tuple[list[Row], list[Row] | None]:
    """Return training rows and the rows of the held-out prompts; None without held-out prompts.

    Raises:
        DataError: all rows of the held-out prompts have been dropped before.
    """
    if prompts is None:
        return rows, None
    train = [row for row in rows if prompt_key(row) not in prompts]
    held = [row for row in rows if prompt_key(row) in prompts]
    if rows and not held:
        raise DataError(
            f"no rows of the {len(prompts)} held-out prompts are left",
            code="data.no-held-out-rows",
            where="data.eval_fraction",
            why="the filter, ties or missing rewards dropped all of them",
            fix="raise `eval_fraction`, loosen `filter`, or give held-out rows in `data.eval`",
        )
    audit.leave_out_all(HELD_OUT, rows, train)
    return train, held


def held_out_filter(stage: Stage, rows: list[Row], audit: Audit) -> list[Row]:
    """Apply the `filter` settings for ties and reversed pairs to held-out pairs.

    The thresholds of `filter` apply to training rows only.
    """
    spec: FilterSpec | None = stage.data.filter
    if spec is not None:
        spec = type(spec).model_construct(ties=spec.ties, reversed=spec.reversed)
    return filter_rows(rows, spec, audit)


def at_most(rows: list[Row], limit: int | None, audit: Audit | None = None) -> list[Row]:
    """Return at most `limit` rows, evenly spaced, so that each source is represented."""
    if limit is None or len(rows) <= limit:
        return rows
    selected = [rows[i * len(rows) // limit] for i in range(limit)]
    if audit is not None:
        audit.leave_out_all(EVAL_ROWS, rows, selected)
    return selected
