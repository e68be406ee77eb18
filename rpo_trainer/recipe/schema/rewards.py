"""`generate`, `score` and `pairs` of a stage; endpoints and judges."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import at_least_one, at_most_one, belongs
from rpo_trainer.recipe.schema.spec import Spec, Text, Url


class EndpointSpec(Spec):
    """A model served by an OpenAI-compatible endpoint."""

    rules = (parts.template_variables,)

    url: Url = Field(description="base URL, for example http://localhost:8000/v1")
    model: Text = Field(description="name of the model at the endpoint")
    api_key_env: Text = Field(
        "OPENAI_API_KEY",
        description="environment variable with the API key; the key is never written to disk",
    )
    concurrency: int = Field(8, ge=1, le=1024, description="number of concurrent requests")
    timeout: float = Field(60.0, gt=0, le=86_400, description="timeout of a request, in seconds")
    retries: int = Field(
        6,
        ge=0,
        le=100,
        description="number of retries per request, with exponential backoff (honors Retry-After)",
    )

    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="variables of the chat template, sent with each chat request (vLLM, SGLang); default: "
        "those of the row, and none for a judge; `{}`: none",
    )


class RewardEndpointSpec(EndpointSpec):
    """A reward model served by an endpoint."""

    api: Literal["rewards", "vllm_score", "vllm_classify"] | None = Field(
        None,
        description="wire format: `rewards` (chat completions that answer with scores by attribute), "
        "`vllm_score` or `vllm_classify` (vLLM's `/score` and `/classify`); default: detected from the "
        "end of the URL",
    )


class JudgeSpec(EndpointSpec):
    """An LLM judge that compares two responses, in both orders."""

    template: Text | None = Field(
        None,
        description="file with the prompt of the judge, with {prompt}, {first} and {second}; it must "
        "request [[A]], [[B]] or [[C]]",
    )
    max_tokens: int = Field(
        1024, ge=1, le=10_000_000, description="maximum length of an answer, in tokens"
    )
    temperature: float = Field(0.0, ge=0, description="sampling temperature of the judge")


class GenerateSpec(Spec):
    """Sampling of responses, from the initial policy of the stage or from others."""

    rules = (parts.policies_to_sample_from,)

    responses: int = Field(
        4, ge=1, le=10_000, description="number of responses per prompt and policy"
    )
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: total probability of the tokens to sample from; 1 disables it",
    )
    top_k: int = Field(
        0, ge=0, le=10_000_000, description="sample from the k most likely tokens; 0 disables it"
    )
    max_new_tokens: int = Field(
        ge=1, le=10_000_000, description="maximum length of a response, in tokens"
    )
    batch_size: int = Field(64, ge=1, le=100_000, description="sequences per generation batch")
    policies: list[Text] = Field(
        ["init"],
        description="policies to sample from: `init` (the initial weights of the stage), `model`, an "
        "earlier stage, or a path (with a slash); several are mixed",
    )
    endpoints: list[EndpointSpec] = Field(
        [], description="OpenAI-compatible endpoints to sample from, in addition to `policies`"
    )
    with_ground_truth: bool = Field(
        False,
        description="add the `ground_truth` of the row, if any, to the sampled responses",
    )


_SCORERS = ("verifier", "model", "endpoint", "judge")
VerifierName = Literal[
    "exact", "partial_match", "numeric", "multiple_choice", "json_schema", "regex",
    "instructions", "asserts",
]  # fmt: skip


class ScoreSpec(Spec):
    """The scorer of the responses: exactly one of the first four fields."""

    rules = (
        at_least_one(
            *_SCORERS,
            at=("verifier",),
            none="`score` has no scorer",
            why="the rewards must come from one of them",
            fix=f"add one of {', '.join(f'`{name}`' for name in _SCORERS)}",
        ),
        at_most_one(
            *_SCORERS,
            both="`score` has both `{first}` and `{other}`",
            why="rewards of different scorers have different units",
        ),
        belongs(
            _SCORERS,
            {
                "weights": ("model", "endpoint"),
                "batch_tokens": ("model",),
                "allow_code_execution": ("verifier",),
            },
            "`{field}` requires `{owners}`; this `score` has `{given}`",
        ),
        parts.code_execution_allowed,
    )

    verifier: VerifierName | None = Field(
        None, description="built-in verifier, which compares responses with the answer in the row"
    )
    model: Text | None = Field(
        None,
        description="reward model: name of an earlier reward stage, or path (with a slash)",
    )
    endpoint: RewardEndpointSpec | None = Field(
        None, description="reward endpoint, which returns scores by attribute"
    )
    judge: JudgeSpec | None = Field(
        None, description="LLM judge, which compares the responses in pairs"
    )
    weights: dict[str, float] | Text | None = Field(
        None,
        description="weight of each attribute of a reward model, or the name of published weights; "
        "default: those of the model, else the mean",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="tokens per forward pass of a reward model, padding included; default: 16384",
    )
    allow_code_execution: bool = Field(
        False, description="allow the verifier `asserts` to run code that a model has written"
    )


class PairsSpec(Spec):
    """Selection of preference rows from scored responses."""

    select: Literal["best_worst", "best_random", "all_pairs", "all_responses"] = Field(
        "best_worst",
        description="`best_worst`, `best_random` (best and a random worse response) and `all_pairs` make "
        "pairs; `all_responses` keeps all responses in one row",
    )
    chosen: Literal["best", "ground_truth"] = Field(
        "best",
        description="chosen response: the `best`, or the `ground_truth` of the row (else the best)",
    )
    ties: Literal["drop", "keep"] = Field(
        "drop", description="what to do with rows (or pairs) with equal rewards"
    )
    min_gap: float = Field(
        0.0,
        ge=0,
        description="drop rows (or pairs) whose gap between best and worst reward is not larger",
    )
