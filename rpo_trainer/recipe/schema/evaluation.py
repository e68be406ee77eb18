"""`eval` of a recipe or a stage."""

from __future__ import annotations

from pydantic import Field

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import at_least_one, requires
from rpo_trainer.recipe.schema.data import SourceSpec
from rpo_trainer.recipe.schema.rewards import GenerateSpec, ScoreSpec
from rpo_trainer.recipe.schema.spec import Spec, Text


class LmEvalSpec(Spec):
    """Tasks of lm-evaluation-harness (extra `eval`)."""

    tasks: list[Text] = Field(
        min_length=1, description="tasks or groups of tasks, for example `ifeval` or `gsm8k`"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of examples per task")
    num_fewshot: int | None = Field(
        None, ge=0, description="few-shot examples; default: as set by the task"
    )
    batch_size: int = Field(8, ge=1, description="sequences per forward pass")
    chat_template: bool = Field(
        False, description="apply the chat template to the questions, for instruct models"
    )
    include_path: Text | None = Field(None, description="directory with your own task files")
    allow_code_execution: bool = Field(
        False, description="allow tasks such as `humaneval` to run code that the model has written"
    )


class EvalSpec(Spec):
    """The evaluation of a policy after a stage."""

    rules = (
        parts.weights_for_all("data"),
        parts.weights_for_all("preferences"),
        parts.weights_for_all("nll"),
        at_least_one(
            "data", "preferences", "nll", "lm_eval",
            at=(),
            none="`eval` is empty",
            of_lists=True,
            why="nothing would be evaluated",
            fix="add at least one of `data`, `preferences`, `nll`, `lm_eval`",
        ),
        parts.sampled_from_the_policy,
        requires(
            "score", "generate",
            what="`score` without `generate`: there are no responses to score",
            why="an evaluation scores sampled responses",
            fix="add `generate: {max_new_tokens: ...}` next to `score`",
        ),
        requires(
            "generate", "score",
            what="`generate` without `score`",
            why="the sampled responses would not be used",
            fix="add `score: {verifier: ...}` next to `generate`",
        ),
        requires(
            "generate", "data",
            what="`generate` without `data`: there are no prompts",
            why="`data` has the held-out prompts",
            fix="add `data: [{path: ...}]` next to `generate`",
        ),
        requires(
            "baseline", "preferences", "generate",
            what="`baseline` without `generate` or `preferences`",
            why="a baseline is compared by sampled responses or held-out pairs",
            fix="add `generate` and `score`, or `preferences`; or remove `baseline`",
        ),
    )  # fmt: skip

    data: list[SourceSpec] = Field([], description="held-out prompts")
    generate: GenerateSpec | None = Field(None, description="sampling of responses to `data`")
    score: ScoreSpec | None = Field(None, description="scorer of the sampled responses")
    greedy: bool = Field(True, description="also decode greedily")
    preferences: list[SourceSpec] = Field(
        [],
        description="held-out pairs: pair accuracy and implicit reward gap (nats) against the baseline",
    )
    nll: list[SourceSpec] = Field(
        [], description="held-out SFT rows: negative log-likelihood per token, by source"
    )
    lm_eval: LmEvalSpec | None = Field(
        None, description="tasks of lm-evaluation-harness (extra `eval`)"
    )
    baseline: Text | None = Field(
        None,
        description="baseline of responses and preferences: `model`, a stage, or a path (with a slash); "
        "default: the initial model of the first preference stage. Earlier stages have no baseline",
    )
    max_rows: int | None = Field(
        None, ge=1, description="maximum number of rows of each of `data`, `preferences`, `nll`"
    )
