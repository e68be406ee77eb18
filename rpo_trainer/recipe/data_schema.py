"""What a recipe may say about data: sources, replay, filters, generated responses, evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe import checks
from rpo_trainer.recipe.spec import Spec, Text


class SourceSpec(Spec):
    """One source of rows: a file, a dataset, or a built-in task."""

    path: Text | None = Field(
        None,
        description="`.jsonl`, `.json`, `.jsonl.gz` or `.parquet` file, `datasets` directory, or "
        "hub name",
    )
    task: Text | None = Field(
        None, description="built-in procedural data, for example `quickstart/code`"
    )
    split: Text | None = Field(
        None, description="split of the dataset or task, for example `train`"
    )
    format: Text | None = Field(
        None, description="name of the format adapter; by default found from the columns"
    )
    columns: dict[str, str] | None = Field(
        None, description="our column name for each column of the file that bears another"
    )
    weight: float | None = Field(
        None, gt=0, description="share of this source in the mixture, relative to the other sources"
    )
    max_rows: int | None = Field(None, ge=1, description="use at most so many rows")
    size: int | None = Field(None, ge=1, description="number of rows that a task makes")
    seed: int | None = Field(None, ge=0, description="seed of a task's rows")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return checks.source_checks(raw)


class ReplaySpec(Spec):
    """Rows of an earlier SFT stage mixed into this one, against forgetting."""

    stage: Text = Field(description="name of the earlier sft stage whose data is replayed")
    fraction: float = Field(gt=0, lt=1, description="how much of it, between 0 and 1")
    of: Literal["mix", "source"] = Field(
        "mix",
        description="what the fraction is of: `mix` = of this stage's blend, `source` = of the "
        "earlier stage's rows",
    )


class FilterSpec(Spec):
    """Which preference rows are good enough to train on; what is dropped is counted."""

    min_chosen_reward: float | None = Field(
        None,
        description="drop rows whose chosen reward is lower; a chosen that is ground truth always "
        "passes",
    )
    min_gap: float | None = Field(
        None,
        ge=0,
        description="drop rows whose reward gap (chosen minus rejected, not scaled) is lower",
    )
    ties: Literal["keep", "drop"] = Field("keep", description="rows whose rewards are equal")
    reversed: Literal["error", "drop", "keep"] = Field(
        "error",
        description="rows whose chosen reward is below the rejected: `error` stops above 0.5 % of "
        "the rows and drops them otherwise",
    )


class GenerateSpec(Spec):
    """Responses sampled from the policy as it is when the stage starts."""

    responses: int = Field(4, ge=1, description="responses for each prompt")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 turns it off")
    top_k: int = Field(0, ge=0, description="sample from the k likeliest tokens; 0 turns it off")
    max_new_tokens: int = Field(ge=1, description="longest response, in tokens")
    batch_size: int = Field(64, ge=1, description="sequences generated at once")


class ScoreSpec(Spec):
    """Where the rewards of the responses come from."""

    verifier: Literal["exact", "partial_match"] = Field(
        description="built-in verifier that compares a response with the row's `ground_truth`"
    )


class PairsSpec(Spec):
    """How scored responses become preference rows."""

    select: Literal["best_worst", "all_responses"] = Field(
        "best_worst",
        description="`best_worst` makes a pair, `all_responses` keeps the row with all its "
        "responses",
    )
    min_gap: float = Field(
        0.0,
        ge=0,
        description="drop rows whose gap between best and worst reward is not larger; they are "
        "counted",
    )


class DataSpec(Spec):
    """The data of a stage."""

    train: list[SourceSpec] = Field(min_length=1, description="sources to train on, mixed")
    eval: list[SourceSpec] = Field(
        [], description="held-out sources for the loss during training (`eval_steps`)"
    )
    replay: ReplaySpec | None = Field(
        None, description="rows of an earlier sft stage mixed in (sft only)"
    )
    filter: FilterSpec | None = Field(
        None, description="quality filter for preference rows (dpo and rpo only)"
    )
    generate: GenerateSpec | None = Field(
        None,
        description="sample the responses from the policy that seeds the stage (dpo and rpo only)",
    )
    score: ScoreSpec | None = Field(
        None, description="give rewards to the responses (dpo and rpo only)"
    )
    pairs: PairsSpec | None = Field(
        None, description="make pairs from scored responses (dpo and rpo only)"
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return checks.data_checks(raw)


class EvalSpec(Spec):
    """What is measured with the policy after a stage."""

    data: list[SourceSpec] = Field(min_length=1, description="held-out sources")
    generate: GenerateSpec | None = Field(None, description="sample responses to the prompts")
    score: ScoreSpec | None = Field(None, description="give rewards to the sampled responses")
    greedy: bool = Field(True, description="decode greedily too, beside sampling")
    max_rows: int | None = Field(None, ge=1, description="use at most so many rows")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return checks.eval_checks(raw)
