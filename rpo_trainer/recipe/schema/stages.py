"""The stages of a recipe: what every kind has, and what each kind adds."""

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

LENGTH_FIELDS = ("num_train_epochs", "max_steps")  # one setting, two spellings


Names: TypeAlias = Annotated[
    str | list[str],
    one_message(
        lambda value: (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        ),
        wrong_value(
            "must be a name or a list of names",
            "write for example `tensorboard`",
            code="recipe.wrong-type",
        ),
    ),
]
ScaleOrAuto: TypeAlias = Annotated[
    float | Literal["auto"],
    one_message(
        lambda value: value == "auto" or (is_number(value) and value > 0),
        wrong_value(
            "must be a number above 0, or `auto`",
            "write for example `1.0`",
            code="recipe.invalid-value",
        ),
    ),
]


class StageBase(Spec):
    """What stages of every kind have.

    Attributes:
        trains_reward_model: the output is a reward model; else it is a policy.
        needs_reference: the loss compares the policy with a `reference`.
    """

    trains_reward_model: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one(
            *LENGTH_FIELDS,
            both="`{first}` and `{other}` are both given",
            why="each of them says how long the stage is",
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
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of the model that the stage delivers in `final`; `auto`: that of the model it "
        "descends from. Later stages start from the exact float32 weights",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations of the loss on `data.eval`"
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="seed of the stage; by default the recipe's"
    )
    report_to: Names = Field(
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
        if all(raw.get(field) is None for field in LENGTH_FIELDS):
            return {**raw, "num_train_epochs": 1.0}
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        yield from super().cross_checks(raw)
        yield from parts.training_args_are_others(raw, cls.model_fields.keys())

    @property
    def models_read(self) -> dict[str, str]:
        """The models that the training reads, by the field that names them: the start, the reference."""
        return {"init": self.init}

    @property
    def own_reference(self) -> str | None:
        """The reference where it is another model than the start; None: it is the same, or not needed."""
        reference = self.models_read.get("reference")
        return None if reference == self.init else reference


class SFTStage(StageBase):
    """Supervised fine-tuning on responses."""

    kind: Literal["sft"] = Field("sft", description="`sft`: supervised fine-tuning")


class PreferenceStage(StageBase):
    """What DPO and RPO have in common."""

    needs_reference = True

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

    @property
    def models_read(self) -> dict[str, str]:
        return {"init": self.init, "reference": self.reference}


class DPOStage(PreferenceStage):
    """Direct preference optimisation, with an optional SFT term."""

    rules = (*PreferenceStage.rules, parts.smoothing_of_the_loss)

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
    reward_scale: ScaleOrAuto = Field(
        1.0,
        description="η, the scale of the given rewards; `auto` fits it to the training rows: to "
        "their preference labels where these do not follow the rewards, else to the median gap",
    )


def _unique(names: list[str] | None) -> list[str] | None:
    if names is not None and len(set(names)) < len(names):
        raise wrong_value(
            "an attribute is named twice",
            "name each once",
            "each is one head of the model",
            code="recipe.repeated-attribute",
        )
    return names


def _ascending(bounds: list[float] | None) -> list[float] | None:
    if bounds is not None and not bounds[0] < bounds[1]:
        raise wrong_value(
            f"`rating_range` goes from {short(bounds[0])} to {short(bounds[1])}",
            "write the lowest rating first",
            "no rating can be between them",
            code="recipe.empty-range",
        )
    return bounds


class RewardStage(StageBase):
    """A reward model: a sequence classifier whose score at the end of a response is its reward.

    It is no policy: `previous` in a later stage is the policy before it.
    """

    trains_reward_model = True
    rules = (
        *StageBase.rules,
        parts.fields_of_the_objective,
        parts.weights_of_the_attributes,
        parts.no_fields_of_a_policy,
        at_most_one(
            "eval", "eval_fraction", within="data",
            both="`data` has both `{first}` and `{other}`",
            why="each of them says which rows are held out",
        ),
    )  # fmt: skip

    kind: Literal["reward"] = Field("reward", description="`reward`: a reward model")
    objective: Literal["bradley_terry", "regression"] = Field(
        description="`bradley_terry`: pairs, −log σ(r_c − r_r − margin); `regression`: rated "
        "responses, the mean squared error over all ratings"
    )
    attributes: Annotated[list[Text] | None, Field(min_length=1), AfterValidator(_unique)] = Field(
        None,
        description="what is rated, a head of the model for each (regression); a missing rating is "
        "masked",
    )
    reward_weights: dict[str, float] | Text | None = Field(
        None,
        description="weight of each attribute in the reward, by name, or published weights "
        "(`nemotron-4-340b-reward`, `llama3-70b-steerlm-rm`); by default those of the model it "
        "starts from, else the mean",
    )
    rating_range: Annotated[
        list[float] | None, Field(min_length=2, max_length=2), AfterValidator(_ascending)
    ] = Field(
        None,
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


Stage: TypeAlias = SFTStage | DPOStage | RPOStage | RewardStage
STAGE_KINDS: dict[str, type[Stage]] = {
    "sft": SFTStage,
    "dpo": DPOStage,
    "rpo": RPOStage,
    "reward": RewardStage,
}
