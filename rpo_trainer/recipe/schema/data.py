"""`data` of a stage: sources, replay, filters, and where responses come from."""

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
            "`{field}` requires a source with `{owners}`; this one has `{given}`",
            {"size": "use `max_rows`"},
        ),
    )

    path: Text | None = Field(
        None,
        description="file (`.jsonl`, `.json`, `.jsonl.gz`, `.parquet`, `.csv`), directory of `datasets`, "
        "or hub name",
    )
    task: Text | None = Field(
        None, description="built-in synthetic data, for example `quickstart/code`"
    )
    split: Text | None = Field(
        None, description="split of the dataset or task, for example `train`"
    )
    format: Text | None = Field(None, description="data format; default: detected from the columns")
    columns: dict[str, str] | None = Field(
        None, description="column names of the file, as `expected name: name in the file`"
    )
    special_tokens: Literal["text", "parse"] | None = Field(
        None,
        description="special tokens in the text of rows: `text`: read as plain text; `parse`: read as "
        "tokens, for rows that were rendered by a chat template; default: `text`, and an error if most "
        "rows have some",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template for this source; they take precedence over "
        "`model.chat_template_kwargs`, and a column of this name over both, key by key",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="weight of this source in the mixture, relative to the other sources",
    )
    max_rows: int | None = Field(None, ge=1, description="maximum number of rows")
    size: int | None = Field(None, ge=1, le=10**7, description="number of rows of a task")
    seed: int | None = Field(None, ge=0, lt=2**32, description="seed of the rows of a task")
    _model_kwargs: dict[str, Any] | None = PrivateAttr(None)

    @property
    def model_kwargs(self) -> dict[str, Any] | None:
        """`model.chat_template_kwargs` of the recipe."""
        return self._model_kwargs

    def inherit(self, model_kwargs: dict[str, Any] | None) -> None:
        """Set `model_kwargs`; the recipe calls this for each of its sources."""
        self._model_kwargs = model_kwargs


class ReplaySpec(Spec):
    """Replay: rows of an earlier SFT stage mixed into this one."""

    stage: Text = Field(description="name of the earlier sft stage whose rows are replayed")
    fraction: float = Field(gt=0, lt=1, description="fraction to replay, between 0 and 1")
    of: Literal["mix", "source"] = Field(
        "mix",
        description="`mix`: fraction of the mixture of this stage; `source`: fraction of the rows of the "
        "earlier stage",
    )


class FilterSpec(Spec):
    """Filter of preference rows; dropped rows are counted."""

    rules = (
        at_most_one(
            "min_chosen_reward", "min_chosen_quantile", "keep_top_fraction",
            both="`filter` has both `{first}` and `{other}`",
            why="each of them is a threshold on the reward of the chosen response",
        ),
    )  # fmt: skip

    min_chosen_reward: float | None = Field(
        None,
        description="drop rows whose chosen response has a lower reward; a chosen response that is "
        "the ground truth always passes",
    )
    min_chosen_quantile: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="the same with a quantile of the rewards of all chosen responses as threshold; 0.75 "
        "keeps the best quarter, ties included",
    )
    keep_top_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="keep this fraction of the rows, those whose chosen responses have the highest rewards, "
        "and all rows whose chosen response is the ground truth",
    )
    min_gap: float | None = Field(
        None,
        ge=0,
        description="drop rows with a smaller reward gap (chosen − rejected, before η)",
    )
    ties: Literal["keep", "drop"] = Field(
        "keep", description="what to do with rows with equal rewards"
    )
    reversed: Literal["error", "drop", "keep"] = Field(
        "error",
        description="what to do with rows whose chosen response has the lower reward: `error` stops if they "
        "are more than 0.5% of the rows, and drops them otherwise",
    )


class DataSpec(Spec):
    """The data of a stage."""

    rules = (
        parts.weights_for_all("train"),
        parts.weights_for_all("eval"),
        at_most_one(
            "eval", "eval_fraction",
            both="`data` has both `{first}` and `{other}`",
            why="each of them defines the held-out rows",
        ),
        requires(
            "eval_overlap", "eval", "eval_fraction", when=lambda value: value == "error",
            what="`eval_overlap: error` without `eval` or `eval_fraction`",
            why="the stage has no held-out rows to compare with",
            fix="add `eval`, or remove `eval_overlap`",
        ),
        requires(
            "generate", "score", when=is_mapping,
            why="sampled responses have no rewards",
            fix="add `score: {verifier: ...}` next to `generate`",
        ),
        parts.two_responses,
        parts.rows_from_one_place,
        requires(
            "resample", "generate",
            why="without sampling, every round reads the same rows",
            fix="remove `resample`",
        ),
    )  # fmt: skip

    train: list[SourceSpec] = Field(
        [],
        min_length=1,
        description="training sources, mixed; required unless `responses_from` is set",
    )
    eval: list[SourceSpec] = Field(
        [],
        description="held-out sources, for the loss before, during (`eval_steps`) and after training",
    )
    eval_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the prompts to hold out, with all their rows, and evaluate on in "
        "place of `eval`; drawn by the seed of the stage",
    )
    replay: ReplaySpec | None = Field(
        None, description="mix in rows of an earlier sft stage (sft only)"
    )
    dedup: Literal["exact", "normalized"] | None = Field(
        None,
        description="keep only the first training row of each prompt; `normalized` ignores case, white "
        "space and Unicode form",
    )
    eval_overlap: Literal["warn", "error"] = Field(
        "warn",
        description="what to do if a held-out prompt, of the stage or the recipe, is also trained on "
        "(compared exactly and normalized)",
    )
    filter: FilterSpec | None = Field(None, description="filter of preference rows (not for sft)")
    generate: GenerateSpec | None = Field(
        None,
        description="sample the responses from a policy (dpo, rpo and bradley_terry only)",
    )
    score: ScoreSpec | None = Field(
        None, description="score the responses (dpo, rpo and bradley_terry only)"
    )
    pairs: PairsSpec | None = Field(
        None, description="make pairs from scored responses (dpo, rpo and bradley_terry only)"
    )
    resample: Literal["every_round", "once"] | None = Field(
        None,
        description="with `repeat` and `generate`: `every_round` samples from the initial policy of each "
        "round (default); `once` samples in the first round, for all rounds",
    )
    responses_from: Text | None = Field(
        None,
        description="name of an earlier stage whose sampled and scored responses are used, in place of "
        "`train`, `generate` and `score`",
    )
