"""The configs of the trainers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rpo_trainer.losses import LOSSES, find_loss, losses_of, smoothed
from rpo_trainer.recipe.foreign_names import FOREIGN_LOSSES, LOSS_SETTINGS, RPO_ALPHA
from rpo_trainer.trainers.argument_status import Problem, Setting
from rpo_trainer.trainers.base_config import BaseConfig, TrlDefault, config, described
from rpo_trainer.trainers.config_checks import noise_problems
from rpo_trainer.trainers.trl_arguments import TrlPreference, TrlReward, TrlSFT
from rpo_trainer.trainers.trl_table import PREFERENCE, REWARD, SFT


def _described_losses(kind: str) -> str:
    return "; ".join(f"`{name}`: {LOSSES[name].description}" for name in losses_of(kind)) + "."


@config
@dataclass
class SFTConfig(TrlSFT, BaseConfig):
    """Supervised fine-tuning: the mean over trained tokens of the global batch of −log π."""

    trl_table: ClassVar[tuple[Setting, ...]] = SFT
    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "dataset_kwargs"]  # noqa: RUF012
    unlike_trl: ClassVar[tuple[str, ...]] = (
        "only assistant turns are trained (TRL trains all tokens of conversations)",
    )

    learning_rate: float = described("Peak learning rate.", 2e-5)


@config
@dataclass
class PreferenceConfig(TrlPreference, BaseConfig):
    """Fields that DPO and RPO share."""

    _kind: ClassVar[str] = ""  # of the losses
    trl_table: ClassVar[tuple[Setting, ...]] = PREFERENCE

    learning_rate: float = described("Peak learning rate.", 1e-6)
    beta: float = described("β: scale of the implicit reward.", 0.1)
    loss_type: str = described("Preference loss.", "dpo")
    sft_loss_weight: float = described("Weight of the SFT loss on the chosen responses.", 0.0)
    sft_reduction: str = described(
        "SFT loss: `sum` over the tokens of a response, then mean over examples; `token_mean`: mean over all "
        "chosen tokens of the global batch; `sequence_mean`: mean over the tokens of a response, then over "
        "examples.",
        "sum",
    )
    average_logps: bool = described(
        "Divide the log-prob of each response by its number of tokens.", False
    )
    disable_dropout: bool = described(
        "Turn off all noise in training (dropout, layer drop, router jitter): the reference model has none.",
        True,
    )
    step0_check: bool = described(
        "Stop before the first update if the log-probs of policy and reference model differ although the "
        "models are the same.",
        True,
    )
    reference_cache_dir: str | None = described(
        "Directory of the cached reference log-probs; None: `reference-cache` in output_dir.", None
    )
    reference_batch_tokens: int = described(
        "Tokens per forward when reference log-probs are computed.", 8192
    )
    rpo_alpha: float | None = described("Refused: use sft_loss_weight.", None)

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        if isinstance(given, (list, tuple)) and len(given) == 1:  # TRL's is a list
            (given,) = given
        if (
            isinstance(given, str)
            and given in FOREIGN_LOSSES
            and FOREIGN_LOSSES[given] in losses_of(self._kind)
        ):
            given = FOREIGN_LOSSES[given]
        self.loss_type = given
        super().__post_init__()

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        problems += noise_problems(self, "the reference model has no noise")
        if self.rpo_alpha is not None:
            problems.append(
                Problem(
                    "rpo_alpha is not supported: in other libraries it is the weight of an NLL term of DPO. "
                    f"Use {RPO_ALPHA}",
                    code="training.unsupported-setting",
                    setting="rpo_alpha",
                )
            )
        known = losses_of(self._kind)
        if self.loss_type not in known:  # it may be a list, which is not hashable
            elsewhere = {**FOREIGN_LOSSES, **LOSS_SETTINGS}
            named = ", its ".join(f"{theirs} is {ours}" for theirs, ours in elsewhere.items())
            hint = f"; TRL's {named}" if "dpo" in known else ""
            problems.append(
                Problem(
                    f"loss_type {self.loss_type!r} is not one of {', '.join(known)}{hint}",
                    code="training.invalid-value",
                    setting="loss_type",
                )
            )
        if not (math.isfinite(self.beta) and self.beta > 0):
            problems.append(
                Problem(
                    f"beta must be a positive number, got {self.beta}",
                    code="training.invalid-value",
                    setting="beta",
                )
            )
        if not (math.isfinite(self.sft_loss_weight) and self.sft_loss_weight >= 0):
            problems.append(
                Problem(
                    f"sft_loss_weight must be 0 or more, got {self.sft_loss_weight}",
                    code="training.invalid-value",
                    setting="sft_loss_weight",
                )
            )
        if self.sft_reduction not in ("sum", "token_mean", "sequence_mean"):
            problems.append(
                Problem(
                    f"sft_reduction must be sum, token_mean or sequence_mean, got {self.sft_reduction!r}",
                    code="training.invalid-value",
                    setting="sft_reduction",
                )
            )
        if self.reference_batch_tokens < 1:
            problems.append(
                Problem(
                    f"reference_batch_tokens must be positive, got {self.reference_batch_tokens}",
                    code="training.invalid-value",
                    setting="reference_batch_tokens",
                )
            )
        return problems


@config
@dataclass
class DPOConfig(PreferenceConfig):
    """Direct Preference Optimization (arXiv 2305.18290), with an SFT term on the chosen responses."""

    _kind: ClassVar[str] = "dpo"
    trl_defaults: ClassVar[Mapping[str, TrlDefault]] = {
        **PreferenceConfig.trl_defaults,
        "loss_type": TrlDefault("", "TRL's `sigmoid` is this loss under another name."),
    }

    loss_type: str = described(_described_losses("dpo"), "dpo")
    label_smoothing: float = described(
        f"Assumed fraction of wrong labels: cDPO (loss_type {smoothed()}).", 0.0
    )

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        if not 0.0 <= self.label_smoothing < 0.5:
            problems.append(
                Problem(
                    f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}",
                    code="training.invalid-value",
                    setting="label_smoothing",
                )
            )
        loss = find_loss(self.loss_type)
        if self.label_smoothing and loss is not None and not loss.label_smoothing:
            problems.append(
                Problem(
                    f"label_smoothing has no effect with loss_type {self.loss_type}: use {smoothed()}, or "
                    "remove it",
                    code="training.no-effect",
                    setting="label_smoothing",
                )
            )
        return problems


@config
@dataclass
class RPOConfig(PreferenceConfig):
    """Reward-aware Preference Optimization (Nemotron-4 340B report, section 3.3.2)."""

    _kind: ClassVar[str] = "rpo"

    loss_type: str = described(_described_losses("rpo"), "rpo_bwd_kl")
    reward_scale: float = described("η: scale of the rewards.", 1.0)

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        scale: Any = self.reward_scale
        if scale == "auto":
            problems.append(
                Problem(
                    "reward_scale must be a positive number, got 'auto', which only recipes accept: use "
                    "`rpo-trainer calibrate` to choose a value",
                    code="training.invalid-value",
                    setting="reward_scale",
                )
            )
        elif not (math.isfinite(scale) and scale > 0):
            problems.append(
                Problem(
                    f"reward_scale must be a positive number, got {scale}",
                    code="training.invalid-value",
                    setting="reward_scale",
                )
            )
        return problems


@config
@dataclass
class RewardConfig(TrlReward, BaseConfig):
    """Reward models: regression on attributes (arXiv 2406.08673), or Bradley-Terry on pairs."""

    trl_table: ClassVar[tuple[Setting, ...]] = REWARD
    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "reward_weights"]  # noqa: RUF012

    learning_rate: float = described("Peak learning rate.", 1e-4)
    disable_dropout: bool = described(
        "Turn off all noise in training (dropout, layer drop, router jitter).", True
    )
    objective: str = described(
        "`bradley_terry` (pairs) or `regression` (ratings of attributes).", "bradley_terry"
    )
    attributes: list[str] | None = described(  # noqa: RUF009
        "Regression: names of the rated attributes, in the order of the outputs of the head.", None
    )
    reward_weights: Mapping[str, float] | str | None = described(
        "Weight of each attribute in the reward, by name; or a published set: nemotron-4-340b-reward, "
        "llama3-70b-steerlm-rm. None: the weights of the model, or else the mean.",
        None,
    )
    rating_range: list[float] | None = described(  # noqa: RUF009
        "Regression: lowest and highest valid rating; None: any number.",
        None,
        metavar="RATING",
    )
    margin_scale: float = described(
        "Bradley-Terry: −log σ(r_c − r_r − margin) with margin = margin_scale · (reward gap of the row). 0: "
        "no margin, and rows need no rewards.",
        0.0,
    )

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        problems += noise_problems(self, "noise would change the scores of a pair")
        if self.objective not in ("bradley_terry", "regression"):
            problems.append(
                Problem(
                    f"objective must be bradley_terry or regression, got {self.objective!r}",
                    code="training.invalid-value",
                    setting="objective",
                )
            )
        names = list(self.attributes or ())
        if self.objective == "regression":
            if not names or len(set(names)) < len(names):
                problems.append(
                    Problem(
                        "regression requires attributes, each named once",
                        code="training.invalid-value",
                        setting="attributes",
                    )
                )
            if self.margin_scale:
                problems.append(
                    Problem(
                        "margin_scale has no effect with objective regression: remove it",
                        code="training.no-effect",
                        setting="margin_scale",
                    )
                )
        else:
            given = ("attributes", self.attributes), ("rating_range", self.rating_range)
            problems += [
                Problem(
                    f"{name} has no effect with objective {self.objective}: remove it",
                    code="training.no-effect",
                    setting=name,
                )
                for name, value in given
                if value is not None
            ]
        if self.rating_range is not None:
            bounds = list(self.rating_range)
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                problems.append(
                    Problem(
                        f"rating_range must be two ascending numbers, got {bounds}",
                        code="training.invalid-value",
                        setting="rating_range",
                    )
                )
        if not (math.isfinite(self.margin_scale) and self.margin_scale >= 0):
            problems.append(
                Problem(
                    f"margin_scale must be 0 or more, got {self.margin_scale}",
                    code="training.invalid-value",
                    setting="margin_scale",
                )
            )
        return problems
