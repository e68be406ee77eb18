"""The `eval` part of a recipe or a stage."""

from __future__ import annotations

from pydantic import Field

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import at_least_one, requires
from rpo_trainer.recipe.schema.data import SourceSpec
from rpo_trainer.recipe.schema.rewards import GenerateSpec, ScoreSpec
from rpo_trainer.recipe.schema.spec import Spec, Text


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

    rules = (
        parts.weights_for_all("data"),
        parts.weights_for_all("preferences"),
        parts.weights_for_all("nll"),
        at_least_one(
            "data", "preferences", "nll", "lm_eval",
            at=(),
            none="`eval` measures nothing",
            of_lists=True,
            why="a stage would be evaluated by nothing, and nobody would notice",
            fix="give at least one of `data`, `preferences`, `nll`, `lm_eval`",
        ),
        parts.sampled_from_the_policy,
        requires(
            "score", "generate",
            what="`score` without `generate`: there are no responses to score",
            why="an evaluation scores what the policy says itself",
            fix="add `generate: {max_new_tokens: ...}` beside `score`",
        ),
        requires(
            "generate", "score",
            what="`generate` without `score`: nobody would look at the responses",
            why="sampling takes time, and nothing would come of it",
            fix="add `score: {verifier: ...}` beside `generate`",
        ),
        requires(
            "generate", "data",
            what="`generate` without `data`: there are no prompts to respond to",
            why="held-out prompts cannot be guessed",
            fix="add `data: [{path: ...}]` beside `generate`",
        ),
        requires(
            "baseline", "preferences", "generate",
            what="`baseline`, and nothing is compared with it",
            why="win rates need sampled responses, margins need held-out pairs",
            fix="add `generate` and `score`, or `preferences`; or remove `baseline`",
        ),
    )  # fmt: skip

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
