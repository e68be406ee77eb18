"""The stages of a recipe: the fields of all kinds, and those of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field
from pydantic_core import InitErrorDetails

from rpo_trainer.recipe.rules import parts
from rpo_trainer.recipe.rules.forms import Rule, at_most_one, is_number, short, wrong_value
from rpo_trainer.recipe.schema.data import DataSpec
from rpo_trainer.recipe.schema.evaluation import EvalSpec
from rpo_trainer.recipe.schema.model import PeftSpec
from rpo_trainer.recipe.schema.spec import LossOf, Spec, Text, one_message

LENGTH_FIELDS = ("num_train_epochs", "max_steps")  # at most one of them


Names: TypeAlias = Annotated[
    str | list[str],
    one_message(
        lambda value: (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        ),
        wrong_value(
            "must be a name or a list of names",
            "write a name, for example `tensorboard`",
            code="recipe.wrong-type",
        ),
    ),
]
ScaleOrAuto: TypeAlias = Annotated[
    float | Literal["auto"],
    one_message(
        lambda value: value == "auto" or (is_number(value) and value > 0),
        wrong_value(
            "must be a number greater than 0, or `auto`",
            "write a number, for example `1.0`",
            code="recipe.invalid-value",
        ),
    ),
]


class StageBase(Spec):
    """Fields of stages of every kind.

    Attributes:
        trains_reward_model: the output is a reward model; otherwise it is a policy.
        needs_reference: the loss compares the policy with a reference model.
    """

    trains_reward_model: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one(
            *LENGTH_FIELDS,
            both="`{first}` and `{other}` cannot be combined",
            why="each of them sets the length of the stage",
        ),
        parts.warmup_fits,
        parts.batches_divide,
        parts.data_of_the_kind,
        parts.responses_of_the_loss,
        parts.skipped_steps,
        parts.saved_dtype,
    )

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="unique name of the stage, and of its directory in the run directory",
    )
    init: Text = Field(
        "previous",
        description="initial weights: `previous` (stage), `model`, the name of an earlier stage, or a "
        "path (with a slash)",
    )
    data: DataSpec = Field(description="data of the stage")
    max_length: int = Field(
        2048, ge=2, description="maximum length of prompt + response, in tokens"
    )
    truncation: Literal["drop", "truncate"] = Field(
        "drop", description="drop or truncate longer examples; both are counted"
    )
    global_batch_size: int = Field(
        ge=1, le=10**7, description="examples per optimizer step, over all processes"
    )
    micro_batch_size: int = Field(
        1,
        ge=1,
        description="examples per forward pass of a process; affects memory and speed, not the result",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens per forward pass of a process in training, in place of `micro_batch_size` "
        "(then for evaluation only); each global batch is split into as many forward passes as needed. "
        "0: none. Default: with FSDP, ZeRO-2 and ZeRO-3 on several processes, the tokens of the largest "
        "micro-batch of `micro_batch_size` examples; otherwise none",
    )
    num_train_epochs: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="passes over the data; default: 1, unless `max_steps` is set",
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps, in place of `num_train_epochs`"
    )
    learning_rate: float = Field(
        gt=0, le=10, description="peak learning rate, for example 1e-5 for SFT or 5e-7 for DPO"
    )
    lr_scheduler_type: Text = Field(
        "constant", description="learning rate schedule, by its name in `transformers`"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warmup")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (AdamW)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")
    max_grad_norm: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    optim: Text = Field("adamw_torch", description="optimizer, by its name in `transformers`")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    logging_steps: int = Field(10, ge=1, description="optimizer steps between log lines")
    save_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between checkpoints; default: no checkpoints, so that a stopped "
        "stage starts again",
    )
    save_total_limit: int = Field(1, ge=1, description="number of checkpoints to keep")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of the model in `final`; `auto`: the dtype of the loaded model. Later stages "
        "start from the exact float32 weights",
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between evaluations on held-out data (`data.eval` or `eval_fraction`)",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="random seed of the stage; default: `seed` of the recipe"
    )
    report_to: Names = Field(
        "none",
        description="experiment trackers, as in `transformers`: `none`, `tensorboard`, `wandb`, ...",
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the load-balancing loss of mixture-of-experts models; 0: none; default: as "
        "in the config of the model (`output_router_logits`)",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="on a NaN or infinite loss or gradient: `stop` before the update, or `skip` the step, "
        "up to `max_skipped_steps` times in the stage",
    )
    max_skipped_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="with `on_nonfinite: skip`: skipped steps before the stage stops; default: 3",
    )
    peft: PeftSpec | None = Field(
        None,
        description="train an adapter: fields of `peft.LoraConfig`, and its use in the next stage",
    )
    training_args: dict[str, Any] = Field(
        {},
        description="fields of `transformers.TrainingArguments` that are not fields of the stage",
    )
    eval: EvalSpec | None = Field(
        None, description="evaluation after this stage, in place of `eval` of the recipe"
    )
    repeat: int = Field(
        1,
        ge=1,
        le=100,
        description="number of rounds: run the stage repeatedly, as NAME-1, NAME-2, ...; each round "
        "starts from the previous one",
    )

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if all(raw.get(field) is None for field in LENGTH_FIELDS):
            return {**raw, "num_train_epochs": 1.0}
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from super().cross_checks(raw)
        yield from parts.training_args_are_others(raw, cls.model_fields.keys())

    @property
    def models_read(self) -> dict[str, str]:
        """The models that training reads, by field: initial weights and reference model."""
        return {"init": self.init}

    @property
    def own_reference(self) -> str | None:
        """The reference model; None if it is the initial model or not needed."""
        reference = self.models_read.get("reference")
        return None if reference == self.init else reference


class SFTStage(StageBase):
    """Supervised fine-tuning on responses."""

    kind: Literal["sft"] = Field("sft", description="`sft`: supervised fine-tuning")


class PreferenceStage(StageBase):
    """Fields of DPO and RPO stages."""

    needs_reference = True

    reference: Text = Field(
        "init",
        description="reference model: `init` (the initial weights of the stage), `previous`, `model`, "
        "the name of an earlier stage, or a path (with a slash)",
    )
    beta: float = Field(
        gt=0,
        description="β, strength of the KL penalty toward the reference model, for example 0.1",
    )
    sft_loss_weight: float = Field(
        0.0, ge=0, description="weight of the SFT loss on the chosen response"
    )
    sft_reduction: Literal["sum", "token_mean", "sequence_mean"] = Field(
        "sum",
        description="reduction of the SFT loss: `sum` over tokens, then mean over examples; `token_mean` "
        "over all tokens of the batch; `sequence_mean`: mean over tokens, then over examples",
    )
    average_logps: bool = Field(
        False, description="use the mean log-prob of the tokens of a response in place of the sum"
    )
    step0_check: bool = Field(
        True, description="compare the loss before the first update with its known value"
    )
    disable_dropout: bool = Field(
        True,
        description="turn off dropout, layer drop and router jitter of the model",
    )

    @property
    def models_read(self) -> dict[str, str]:
        return {"init": self.init, "reference": self.reference}


class DPOStage(PreferenceStage):
    """Direct Preference Optimization, with an optional SFT term."""

    rules = (*PreferenceStage.rules, parts.smoothing_of_the_loss)

    kind: Literal["dpo"] = Field("dpo", description="`dpo`: Direct Preference Optimization")
    loss_type: Annotated[str, LossOf("dpo")] = Field("dpo", description="preference loss")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="assumed probability that the label of a pair is wrong (cDPO)",
    )


class RPOStage(PreferenceStage):
    """Reward-aware Preference Optimization: the implicit reward gap is trained to match the target gap."""

    kind: Literal["rpo"] = Field("rpo", description="`rpo`: Reward-aware Preference Optimization")
    loss_type: Annotated[str, LossOf("rpo")] = Field(
        "rpo_bwd_kl", description="preference loss; the paper uses `rpo_bwd_kl`"
    )
    reward_scale: ScaleOrAuto = Field(
        1.0,
        description="η, scale of the given rewards; `auto` fits it to the training rows: to the preference "
        "labels if some disagree with the rewards, else to the median gap",
    )


def _unique(names: list[str] | None) -> list[str] | None:
    if names is not None and len(set(names)) < len(names):
        raise wrong_value(
            "an attribute is listed twice",
            "list each attribute once",
            "each attribute is one output of the model",
            code="recipe.repeated-attribute",
        )
    return names


def _ascending(bounds: list[float] | None) -> list[float] | None:
    if bounds is not None and not bounds[0] < bounds[1]:
        raise wrong_value(
            f"`rating_range` is empty: from {short(bounds[0])} to {short(bounds[1])}",
            "write the lowest rating first",
            None,
            code="recipe.empty-range",
        )
    return bounds


class RewardStage(StageBase):
    """A reward model: a sequence classifier whose output at the end of a response is the reward.

    It is not a policy: `previous` in a later stage is the policy before it.
    """

    trains_reward_model = True
    rules = (
        *StageBase.rules,
        parts.fields_of_the_objective,
        parts.weights_of_the_attributes,
        parts.no_fields_of_a_policy,
    )

    kind: Literal["reward"] = Field("reward", description="`reward`: a reward model")
    objective: Literal["bradley_terry", "regression"] = Field(
        description="`bradley_terry`: −log σ(r_chosen − r_rejected − margin) on pairs; `regression`: mean "
        "squared error on rated responses"
    )
    attributes: Annotated[list[Text] | None, Field(min_length=1), AfterValidator(_unique)] = Field(
        None,
        description="rated attributes, one output of the model each (regression); missing ratings are "
        "masked",
    )
    reward_weights: dict[str, float] | Text | None = Field(
        None,
        description="weight of each attribute in the reward, or the name of published weights "
        "(`nemotron-4-340b-reward`, `llama3-70b-steerlm-rm`); default: those of the initial model, else "
        "the mean",
    )
    rating_range: Annotated[
        list[float] | None, Field(min_length=2, max_length=2), AfterValidator(_ascending)
    ] = Field(
        None,
        description="lowest and highest valid rating (regression); other ratings are errors",
    )
    margin_scale: float = Field(
        0.0,
        ge=0,
        description="margin as a multiple of the reward gap (bradley_terry); 0: no margin, no rewards "
        "needed",
    )
    disable_dropout: bool = Field(
        True,
        description="turn off dropout, layer drop and router jitter of the model",
    )


Stage: TypeAlias = SFTStage | DPOStage | RPOStage | RewardStage
STAGE_KINDS: dict[str, type[Stage]] = {
    "sft": SFTStage,
    "dpo": DPOStage,
    "rpo": RPOStage,
    "reward": RewardStage,
}
