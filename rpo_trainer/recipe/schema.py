"""What a recipe may hold: one typed model for each level of the YAML file.

Values are strict (a number in quotes is text), unknown keys are errors, and every model reports its
cross-field errors (`checks.py`) together with the errors of its fields, so that a recipe shows all
its mistakes at once. Paths are kept as written; they are relative to the recipe file
(`resolve_path`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe import chain_checks, checks, eval_checks, reward_checks
from rpo_trainer.recipe.data_schema import (
    DataSpec,
    EndpointSpec,
    EvalSpec,
    FilterSpec,
    GenerateSpec,
    JudgeSpec,
    PairsSpec,
    ReplaySpec,
    ScoreSpec,
    SourceSpec,
)
from rpo_trainer.recipe.loss_field import LossOf
from rpo_trainer.recipe.model_schema import ModelSpec
from rpo_trainer.recipe.peft_schema import PeftSpec, peft_chain_checks
from rpo_trainer.recipe.spec import Spec, Text

__all__ = [
    "STAGE_KINDS",
    "DPOStage",
    "DataSpec",
    "EndpointSpec",
    "EvalSpec",
    "FilterSpec",
    "GenerateSpec",
    "JudgeSpec",
    "ModelSpec",
    "PairsSpec",
    "PeftSpec",
    "PreferenceStage",
    "RPOStage",
    "Recipe",
    "ReplaySpec",
    "RewardStage",
    "SFTStage",
    "ScoreSpec",
    "SourceSpec",
    "Stage",
    "StageBase",
]

NOT_DEFAULTS = ("name", "kind")  # what makes a stage that stage cannot come from `defaults`


def _text_or_list(value: object) -> object:
    """One message for a union; pydantic alone gives one for each member."""
    if isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ):
        return value
    raise checks.wrong_value("must be a name or a list of names", "write for example `tensorboard`")


def _scale_or_auto(value: object) -> object:
    """One message for a union; pydantic alone gives one for each member."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (number and value > 0):  # type: ignore[operator]
        return value
    raise checks.wrong_value("must be a number above 0, or `auto`", "write for example `1.0`")


class StageBase(Spec):
    """What stages of every kind have."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="unique name of the stage; its directory in the run directory",
    )
    init: Text = Field(
        "previous",
        description="where the weights come from: `previous`, `model`, the name of an earlier "
        "stage, or a path (with a slash)",
    )
    data: DataSpec = Field(description="what the stage trains on")
    max_length: int = Field(2048, ge=2, description="longest prompt + response, in tokens")
    truncation: Literal["drop", "cut"] = Field(
        "drop", description="longer examples are dropped or cut; both are counted"
    )
    global_batch_size: int = Field(
        ge=1, le=10**7, description="examples for each optimizer step, over all processes"
    )
    micro_batch_size: int = Field(
        1,
        ge=1,
        description="examples for each forward pass of a process; changes memory and speed, not "
        "the result",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of each forward pass of a process in training, in place of "
        "`micro_batch_size`, which then holds for evaluation alone: each global batch is dealt into "
        "as many forward passes as its lengths need; changes memory and speed, not the result",
    )
    num_train_epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the data; 1 if `max_steps` is not given either"
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps, in place of `num_train_epochs`"
    )
    learning_rate: float = Field(gt=0, le=10, description="peak learning rate, for example 3e-7")
    lr_scheduler_type: Text = Field(
        "constant", description="learning rate schedule, a name that `transformers` knows"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm clip; 0 turns it off")
    optim: Text = Field("adamw_torch", description="optimizer, a name that `transformers` knows")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    logging_steps: int = Field(10, ge=1, description="steps in a logging window")
    save_steps: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints; without it a stage that is killed begins again",
    )
    save_total_limit: int = Field(1, ge=1, description="checkpoints kept")
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations of the loss on `data.eval`"
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="seed of the stage; by default the recipe's"
    )
    report_to: Annotated[str | list[str], BeforeValidator(_text_or_list)] = Field(
        "none", description="trackers, as in `transformers`: `none`, `tensorboard`, `wandb`, ..."
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the load-balancing loss of a mixture of experts' routers; 0: none; by "
        "default what the model's config asks for (`output_router_logits`)",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="a loss or gradient that is NaN or infinite: `stop` before the weights move, or "
        "`skip`: leave such steps out, up to `max_skipped_steps` in the stage",
    )
    max_skipped_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="with `on_nonfinite: skip`, how many steps may be left out before the stage "
        "stops; by default 3",
    )
    peft: PeftSpec | None = Field(
        None,
        description="train an adapter: fields of `peft.LoraConfig`, and what becomes of it",
    )
    training_args: dict[str, Any] = Field(
        {},
        description="other fields of `transformers.TrainingArguments`, those without a name of "
        "their own here",
    )
    eval: EvalSpec | None = Field(
        None, description="what is measured after this stage, in place of the recipe's `eval`"
    )
    repeat: int = Field(
        1,
        ge=1,
        le=100,
        description="run the stage so many times, as name-1, name-2, ...; each starts from the "
        "one before",
    )

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if all(raw.get(field) is None for field in checks.LENGTH_FIELDS):
            return {**raw, "num_train_epochs": 1.0}
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        return checks.stage_checks(raw, frozenset(cls.model_fields))


class SFTStage(StageBase):
    """Supervised fine-tuning on responses."""

    kind: Literal["sft"] = Field("sft", description="`sft`: supervised fine-tuning")


class PreferenceStage(StageBase):
    """What DPO and RPO have in common."""

    reference: Text = Field(
        "init",
        description="the reference policy: `init` (the weights the stage starts from), "
        "`previous`, `model`, the name of an earlier stage, or a path (with a slash)",
    )
    beta: float = Field(
        gt=0, description="β, the strength of the tie to the reference, for example 0.01"
    )
    sft_loss_weight: float = Field(
        0.0, ge=0, description="weight of the SFT loss on the chosen response"
    )
    sft_reduction: Literal["sum", "token_mean", "sequence_mean"] = Field(
        "sum",
        description="`sum` over a response's tokens then mean over examples, `token_mean` over "
        "all tokens of the batch, or `sequence_mean`",
    )
    average_logps: bool = Field(
        False, description="use the mean log-probability of a response's tokens in place of the sum"
    )
    step0_check: bool = Field(
        True, description="check the loss before the first update against its known constant"
    )
    disable_dropout: bool = Field(
        True,
        description="turn the model's noise in training off: dropout, layer drop, router jitter",
    )


class DPOStage(PreferenceStage):
    """Direct preference optimisation, with an optional SFT term."""

    kind: Literal["dpo"] = Field("dpo", description="`dpo`: direct preference optimisation")
    loss_type: Annotated[str, LossOf("dpo")] = Field("dpo", description="the preference loss")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a pair's label is wrong (cDPO)"
    )


class RPOStage(PreferenceStage):
    """Reward-aware preference optimisation: the implicit gap learns the gap of given rewards."""

    kind: Literal["rpo"] = Field("rpo", description="`rpo`: reward-aware preference optimisation")
    loss_type: Annotated[str, LossOf("rpo")] = Field(
        "rpo_bwd_kl", description="the preference loss; `rpo_bwd_kl` is the paper's"
    )
    reward_scale: Annotated[float | Literal["auto"], BeforeValidator(_scale_or_auto)] = Field(
        1.0,
        description="η, the scale of the given rewards; `auto` fits it to the training rows: to "
        "their preference labels where these do not follow the rewards, else to the median gap",
    )


class RewardStage(StageBase):
    """A reward model: a sequence classifier whose score at the end of a response is its reward.

    It is no policy: `previous` in a later stage is the policy before it.
    """

    kind: Literal["reward"] = Field("reward", description="`reward`: a reward model")
    objective: Literal["bradley_terry", "regression"] = Field(
        description="`bradley_terry`: pairs, −log σ(r_c − r_r − margin); `regression`: rated "
        "responses, the mean squared error over all ratings"
    )
    attributes: list[Text] | None = Field(
        None,
        min_length=1,
        description="what is rated, a head of the model for each (regression); a missing rating is "
        "masked",
    )
    reward_weights: dict[str, float] | Text | None = Field(
        None,
        description="weight of each attribute in the reward, by name, or published weights "
        "(`nemotron-4-340b-reward`, `llama3-70b-steerlm-rm`); by default those of the model it "
        "starts from, else the mean",
    )
    rating_range: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="lowest and highest rating that can be right (regression); others are errors",
    )
    margin_scale: float = Field(
        0.0,
        ge=0,
        description="the margin is this times the gap of the given rewards (bradley_terry); 0: no "
        "margin, and no rewards are needed",
    )
    disable_dropout: bool = Field(
        True,
        description="turn the model's noise in training off: dropout, layer drop, router jitter",
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from super().cross_checks(raw)
        yield from reward_checks.reward_stage_checks(raw)


Stage: TypeAlias = SFTStage | DPOStage | RPOStage | RewardStage
STAGE_KINDS: dict[str, type[Stage]] = {
    "sft": SFTStage,
    "dpo": DPOStage,
    "rpo": RPOStage,
    "reward": RewardStage,
}


class Recipe(Spec):
    """A chain of training stages, each seeded by the one before it."""

    model: ModelSpec = Field(description="the model that the first stage starts from")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all that is random")
    run_dir: Text | None = Field(
        None, description="where the run is written; the command line's `--run-dir` comes first"
    )
    defaults: dict[str, Any] = Field(
        {},
        description="stage fields that hold for every stage that has them and does not give its "
        "own; a field is taken whole, never merged",
    )
    eval: EvalSpec | None = Field(None, description="what is measured after every stage")
    stages: list[Annotated[Stage, Field(discriminator="kind")]] = Field(
        min_length=1, description="the stages, in order"
    )

    def model_post_init(self, _: Any) -> None:
        """The sources get the model's `chat_template_kwargs`."""
        for _, source in self.sources():
            source.inherit(self.model.chat_template_kwargs)

    def sources(self) -> Iterator[tuple[str, SourceSpec]]:
        """All sources of data, each with its key in the recipe."""
        parts: list[tuple[str, EvalSpec | None]] = [("eval", self.eval)]
        for stage in self.stages:
            own = f"stages.{stage.name}"
            for field in ("train", "eval"):
                yield from _numbered(f"{own}.data.{field}", getattr(stage.data, field))
            parts.append((f"{own}.eval", stage.eval))
        for key, spec in parts:
            for field in ("data", "preferences", "nll") if spec is not None else ():
                yield from _numbered(f"{key}.{field}", getattr(spec, field))

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Stages as mappings, each with the defaults that belong to its kind."""
        stages, defaults = raw.get("stages"), raw.get("defaults")
        if not isinstance(stages, list):
            return raw
        plain = [s.model_dump() if isinstance(s, StageBase) else s for s in stages]
        if isinstance(defaults, dict):
            plain = [with_defaults(s, defaults) if isinstance(s, dict) else s for s in plain]
        return {**raw, "stages": plain}

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from _default_checks(raw.get("defaults"))
        yield from chain_checks.recipe_checks(raw)
        yield from reward_checks.reference_checks(raw)
        yield from eval_checks.eval_reference_checks(raw)
        yield from peft_chain_checks(raw)


def _numbered(key: str, sources: list[SourceSpec]) -> Iterator[tuple[str, SourceSpec]]:
    yield from ((f"{key}.{number}", source) for number, source in enumerate(sources))


def with_defaults(stage: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A raw stage with the defaults of its kind; its own fields, null too, come first."""
    kind = STAGE_KINDS.get(str(stage.get("kind")))
    if kind is None:
        return stage
    skipped = set(NOT_DEFAULTS)
    if any(stage.get(field) is not None for field in checks.LENGTH_FIELDS):
        skipped |= set(checks.LENGTH_FIELDS)
    taken = {k: v for k, v in defaults.items() if k in kind.model_fields and k not in skipped}
    return {**taken, **stage}


def _default_checks(defaults: object) -> Iterator[InitErrorDetails]:
    """Each default must be a field of some kind of stage, with a value that one of them takes."""
    if not isinstance(defaults, dict):
        return
    for key, value in defaults.items():
        kinds = [kind for kind in STAGE_KINDS.values() if key in kind.model_fields]
        if key in NOT_DEFAULTS or not kinds:
            yield InitErrorDetails(type="extra_forbidden", loc=("defaults", key), input=value)
            continue
        per_kind = [list(_default_errors(kind, key, defaults)) for kind in kinds]
        if all(per_kind):
            yield from per_kind[0]


def _default_errors(
    kind: type[Stage], key: str, defaults: Mapping[str, Any]
) -> Iterator[InitErrorDetails]:
    """What is wrong with one default, beside the others that stages of this kind get."""
    try:
        kind.model_validate({k: v for k, v in defaults.items() if k in kind.model_fields})
    except ValidationError as error:
        for detail in checks.details_of(error):
            if detail["loc"][:1] == (key,):
                yield {**detail, "loc": ("defaults", *detail["loc"])}
