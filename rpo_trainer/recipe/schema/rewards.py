"""Responses and their rewards: endpoints, judges, sampling, scoring, pairs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import at_least_one, at_most_one, belongs
from rpo_trainer.recipe.schema.spec import Spec, Text, Url


class EndpointSpec(Spec):
    """A model behind an OpenAI-compatible endpoint."""

    rules = (parts.template_variables,)

    url: Url = Field(description="base url, for example http://localhost:8000/v1")
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


class RewardEndpointSpec(EndpointSpec):
    """A reward model behind an endpoint."""

    api: Literal["rewards", "vllm_score", "vllm_classify"] | None = Field(
        None,
        description="wire format: `rewards` (chat completions that answer with scores by attribute), "
        "`vllm_score` or `vllm_classify` (vLLM's `/score` and `/classify`); by default from the end of "
        "the url",
    )


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

    rules = (parts.policies_to_sample_from,)

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


_SCORERS = ("verifier", "model", "endpoint", "judge")
VerifierName = Literal[
    "exact", "partial_match", "numeric", "multiple_choice", "json_schema", "regex",
    "instructions", "asserts",
]  # fmt: skip


class ScoreSpec(Spec):
    """Where the rewards of the responses come from; one of the first four."""

    rules = (
        at_least_one(
            *_SCORERS,
            at=("verifier",),
            none="`score` names no scorer",
            why="nothing says where the rewards come from",
            fix=f"give one of {', '.join(f'`{name}`' for name in _SCORERS)}",
        ),
        at_most_one(
            *_SCORERS,
            both="`score` has both `{first}` and `{other}`",
            why="each of them gives the rewards",
        ),
        belongs(
            _SCORERS,
            {
                "weights": ("model", "endpoint"),
                "batch_tokens": ("model",),
                "allow_code_execution": ("verifier",),
            },
            "`{field}` belongs to `{owners}`, not to `{given}`",
        ),
        parts.code_execution_allowed,
    )

    verifier: VerifierName | None = Field(
        None, description="built-in verifier: rewards from what a row says about right answers"
    )
    model: Text | None = Field(
        None,
        description="reward model: the name of an earlier reward stage, or a path (with a slash)",
    )
    endpoint: RewardEndpointSpec | None = Field(
        None, description="reward model behind an endpoint that answers with scores"
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
