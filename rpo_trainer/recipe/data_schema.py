"""What a recipe may say about data: sources, replay, filters, generated responses, evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe import checks, eval_checks, reward_checks
from rpo_trainer.recipe.spec import Spec, Text


class SourceSpec(Spec):
    """One source of rows: a file, a dataset, or a built-in task."""

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

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return reward_checks.filter_checks(raw)


class EndpointSpec(Spec):
    """A model behind an OpenAI-compatible endpoint."""

    url: Text = Field(description="base url, for example http://localhost:8000/v1")
    model: Text = Field(description="the model's name there")
    api_key_env: Text = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key; it is written nowhere",
    )
    concurrency: int = Field(8, ge=1, le=1024, description="requests at a time")
    timeout: float = Field(
        60.0, gt=0, le=86_400, description="seconds for a whole answer before the next try"
    )
    retries: int = Field(
        6,
        ge=0,
        le=100,
        description="further tries of a request, each after a longer wait (Retry-After)",
    )

    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template of the model there (vLLM, SGLang), sent with each "
        "chat request; by default those of the row, and for a judge none. `{}`: none are sent",
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from checks.template_checks(raw)
        yield from reward_checks.endpoint_checks(raw)


class JudgeSpec(EndpointSpec):
    """An LLM that says which of two responses is better, asked in both orders."""

    template: Text | None = Field(
        None,
        description="file with the prompt, with {prompt}, {first} and {second} in it; it must ask "
        "for [[A]], [[B]] or [[C]]",
    )
    max_tokens: int = Field(1024, ge=1, le=10_000_000, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="sampling temperature of the judge")


class GenerateSpec(Spec):
    """Responses sampled from the policy as it is when the stage starts, or from other policies."""

    responses: int = Field(
        4, ge=1, le=10_000, description="responses for each prompt, from each policy"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 turns it off")
    top_k: int = Field(
        0, ge=0, le=10_000_000, description="sample from the k likeliest tokens; 0 turns it off"
    )
    max_new_tokens: int = Field(ge=1, le=10_000_000, description="longest response, in tokens")
    batch_size: int = Field(64, ge=1, le=100_000, description="sequences generated at once")
    policies: list[Text] = Field(
        ["init"],
        description="what is sampled from: `init` (the policy that seeds the stage), an earlier "
        "stage, or a path (with a slash); several are mixed",
    )
    endpoints: list[EndpointSpec] = Field(
        [], description="policies behind OpenAI-compatible endpoints, beside `policies`"
    )
    with_ground_truth: bool = Field(
        False,
        description="add the row's `ground_truth`, where there is one, behind the sampled responses, to "
        "be scored like them",
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return reward_checks.generate_checks(raw)


VerifierName = Literal[
    "exact", "partial_match", "numeric", "multiple_choice", "json_schema", "regex",
    "instructions", "asserts",
]  # fmt: skip


class ScoreSpec(Spec):
    """Where the rewards of the responses come from; one of the first four."""

    verifier: VerifierName | None = Field(
        None, description="built-in verifier: rewards from what a row says about right answers"
    )
    model: Text | None = Field(
        None,
        description="reward model: the name of an earlier reward stage, or a path (with a slash)",
    )
    endpoint: EndpointSpec | None = Field(
        None, description="reward model behind an endpoint that answers with scores by attribute"
    )
    judge: JudgeSpec | None = Field(None, description="LLM that compares the responses in pairs")
    weights: dict[str, float] | Text | None = Field(
        None,
        description="weight of each attribute of a reward model, or the name of published weights; "
        "by default the model's own, else the mean",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="tokens in a forward pass of a reward model, padding counted where there is any; "
        "by default 16384",
    )
    allow_code_execution: bool = Field(
        False, description="let the verifier `asserts` run code that a model has written"
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return reward_checks.score_checks(raw)


class PairsSpec(Spec):
    """How scored responses become preference rows."""

    select: Literal["best_worst", "best_random", "all_pairs", "all_responses"] = Field(
        "best_worst",
        description="`best_worst`, `best_random` (best against a random worse one) and `all_pairs` "
        "make pairs, `all_responses` keeps the row with all its responses",
    )
    chosen: Literal["best", "ground_truth"] = Field(
        "best",
        description="`ground_truth`: the chosen is the response that is the row's ground truth, "
        "where there is one, else the best",
    )
    ties: Literal["drop", "keep"] = Field(
        "drop", description="rows (or pairs) whose rewards are all equal"
    )
    min_gap: float = Field(
        0.0,
        ge=0,
        description="drop rows (or pairs) whose gap between best and worst reward is not larger; "
        "they are counted",
    )


class DataSpec(Spec):
    """The data of a stage."""

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
    dedup: Literal["exact", "normalised"] | None = Field(
        None,
        description="keep the first training row of each prompt and count the others; `normalised` "
        "compares without regard to case, white space and Unicode form",
    )
    held_out: bool = Field(
        False,
        description="`eval`, and the recipe's, is held out: a prompt of it that is trained on, exactly "
        "or normalised, is an error and not a warning",
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
        description="with `repeat` and `generate`: `each` round samples from the policy that seeds "
        "it (the default), or `never` again after the first, whose responses all rounds use",
    )
    responses_from: Text | None = Field(
        None,
        description="use the sampled and scored responses of this earlier stage, in place of "
        "`generate` and `score`",
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from checks.data_checks(raw)
        yield from reward_checks.rows_of_checks(raw)


class LmEvalSpec(Spec):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`)."""

    tasks: list[Text] = Field(
        min_length=1, description="tasks or groups of tasks, for example `ifeval` or `gsm8k`"
    )
    limit: int | None = Field(None, ge=1, description="use at most so many examples of each task")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each; by default as many as the task says"
    )
    batch_size: int = Field(8, ge=1, description="sequences in a forward pass")
    chat_template: bool = Field(
        False, description="put the questions through the chat template, as instruct models expect"
    )
    include_path: Text | None = Field(None, description="directory with task files of your own")
    allow_code_execution: bool = Field(
        False, description="let tasks such as `humaneval` run code that the model has written"
    )


class EvalSpec(Spec):
    """What is measured with the policy after a stage."""

    data: list[SourceSpec] = Field([], description="held-out prompts to sample responses to")
    generate: GenerateSpec | None = Field(None, description="sample responses to the prompts")
    score: ScoreSpec | None = Field(
        None, description="give rewards to the sampled responses, or let a judge compare them"
    )
    greedy: bool = Field(True, description="decode greedily too, beside sampling")
    preferences: list[SourceSpec] = Field(
        [],
        description="held-out pairs: how often, and by how many nats, the policy prefers the chosen "
        "response more than the baseline does",
    )
    nll: list[SourceSpec] = Field(
        [], description="held-out SFT rows: negative log-likelihood a token, for each source"
    )
    lm_eval: LmEvalSpec | None = Field(
        None, description="tasks of lm-evaluation-harness (extra `eval`)"
    )
    baseline: Text | None = Field(
        None,
        description="what responses and preferences are compared with: `model`, a stage, or a path "
        "(with a slash); by default what the first preference stage starts from. Stages before it "
        "are compared with nothing",
    )
    max_rows: int | None = Field(
        None, ge=1, description="use at most so many rows of each of `data`, `preferences`, `nll`"
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return eval_checks.eval_checks(raw)
