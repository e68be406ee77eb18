"""The `data` part of a stage: its sources, replay, filters, and where responses come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import at_most_one, belongs, exactly_one, is_mapping, requires
from rpo_trainer.recipe.schema.rewards import GenerateSpec, PairsSpec, ScoreSpec
from rpo_trainer.recipe.schema.spec import Spec, Text


class SourceSpec(Spec):
    """One source of rows: a file, a dataset, or a built-in task."""

    rules = (
        parts.template_variables,
        *exactly_one("path", "task", "a source"),
        belongs(
            ("path", "task"),
            {"size": ("task",), "seed": ("task",)}
            | dict.fromkeys(("format", "columns", "special_tokens"), ("path",)),
            "`{field}` is for sources with `{owners}`; this one has `{given}`",
            {"size": "use `max_rows`"},
        ),
    )

    path: Text | None = Field(
        None,
        description="`.jsonl`, `.json`, `.jsonl.gz`, `.parquet` or `.csv` file, `datasets` directory, or "
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
    special_tokens: Literal["text", "parse"] | None = Field(
        None,
        description="what the text of special tokens in the rows stands for: `text` = letters, `parse` = "
        "the tokens, for rows that went through a chat template before; by default `text`, and an error "
        "where most rows hold some",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template for the rows of this source; a row's own column of "
        "this name goes before them, and they go before `model.chat_template_kwargs`, key by key",
    )
    weight: float | None = Field(
        None, gt=0, description="share of this source in the mixture, relative to the other sources"
    )
    max_rows: int | None = Field(None, ge=1, description="use at most so many rows")
    size: int | None = Field(None, ge=1, le=10**7, description="number of rows that a task makes")
    seed: int | None = Field(None, ge=0, lt=2**32, description="seed of a task's rows")
    _model_kwargs: dict[str, Any] | None = PrivateAttr(None)

    @property
    def model_kwargs(self) -> dict[str, Any] | None:
        """`model.chat_template_kwargs` of the recipe that the source is part of."""
        return self._model_kwargs

    def inherit(self, model_kwargs: dict[str, Any] | None) -> None:
        """Takes over `model.chat_template_kwargs`; the recipe does it for its sources."""
        self._model_kwargs = model_kwargs


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

    rules = (
        at_most_one(
            "min_chosen_reward", "min_chosen_quantile", "keep_top_fraction",
            both="`filter` has both `{first}` and `{other}`",
            why="each of them says which chosen responses are good enough",
        ),
    )  # fmt: skip

    min_chosen_reward: float | None = Field(
        None,
        description="drop rows whose chosen reward is lower; a chosen that is ground truth always "
        "passes",
    )
    min_chosen_quantile: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="the same with the threshold at this quantile of all chosen rewards; 0.75 keeps "
        "the best quarter, and what equals its last",
    )
    keep_top_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="keep this share of the rows, those with the best chosen rewards, and beside "
        "them every chosen that is ground truth",
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


class DataSpec(Spec):
    """The data of a stage."""

    rules = (
        parts.weights_for_all("train"),
        parts.weights_for_all("eval"),
        requires(
            "eval_overlap", "eval", when=lambda value: value == "error",
            what="`eval_overlap: error` without `eval`",
            why="there are no rows that it says this of",
            fix="add `eval`, or remove `eval_overlap`",
        ),
        requires(
            "generate", "score", when=is_mapping,
            why="sampled responses would have no rewards, so that none is better than another",
            fix="add `score: {verifier: ...}` beside `generate`",
        ),
        parts.two_responses,
        parts.rows_from_one_place,
        requires(
            "resample", "generate",
            why="the same rows are read in each round anyway",
            fix="remove `resample`",
        ),
    )  # fmt: skip

    train: list[SourceSpec] = Field(
        [],
        min_length=1,
        description="sources to train on, mixed; absent only where `responses_from` is given",
    )
    eval: list[SourceSpec] = Field(
        [], description="held-out sources for the loss during training (`eval_steps`)"
    )
    eval_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="set this share of the prompts aside, with all their rows, and evaluate on them "
        "in place of `eval` (reward only)",
    )
    replay: ReplaySpec | None = Field(
        None, description="rows of an earlier sft stage mixed in (sft only)"
    )
    dedup: Literal["exact", "normalized"] | None = Field(
        None,
        description="keep the first training row of each prompt and count the others; `normalized` "
        "compares without regard to case, white space and Unicode form",
    )
    eval_overlap: Literal["warn", "error"] = Field(
        "warn",
        description="a prompt of `eval`, or of the recipe's, that is trained on, exactly or normalized: "
        "`warn` or `error`",
    )
    filter: FilterSpec | None = Field(
        None, description="quality filter for preference rows (not of sft)"
    )
    generate: GenerateSpec | None = Field(
        None,
        description="sample the responses from the policy that seeds the stage (of pairs only: dpo, rpo, "
        "Bradley-Terry)",
    )
    score: ScoreSpec | None = Field(
        None, description="give rewards to the responses (of pairs only)"
    )
    pairs: PairsSpec | None = Field(
        None, description="make pairs from scored responses (of pairs only)"
    )
    resample: Literal["every_round", "once"] | None = Field(
        None,
        description="with `repeat` and `generate`: `every_round` samples from the policy that seeds "
        "it (the default), or `once`: only the first, whose responses all rounds use",
    )
    responses_from: Text | None = Field(
        None,
        description="use the sampled and scored responses of this earlier stage, in place of "
        "`generate` and `score`",
    )
