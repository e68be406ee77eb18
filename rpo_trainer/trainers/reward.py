"""Reward models: regression on ratings of attributes, or Bradley-Terry on pairs."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from rpo_trainer.models.loading import load_model_named, load_tokenizer_named
from rpo_trainer.models.reward_model import (
    as_reward_model,
    attributes_of,
    weights_of,
    with_pad_token,
)
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.step.forward import response_scores
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.config import RewardConfig
from rpo_trainer.trainers.examples import Examples, PackingCollator
from rpo_trainer.trainers.reward_data import (
    RatingBatch,
    RatingCollator,
    check_ends,
    check_pairs,
    check_rated,
)
from rpo_trainer.trainers.reward_losses import bradley_terry_loss, regression_losses
from rpo_trainer.trainers.reward_metrics import Table, pair_metrics, rating_metrics
from rpo_trainer.trainers.setup import (
    loaded_dtype,
    loading_settings,
    tokenizer_in,
    tokenizer_of,
)
from rpo_trainer.trainers.step_result import StepOutputs, StepResult, Term

logger = logging.getLogger(__name__)


class RewardTrainer(BaseTrainer):
    """Trains a sequence classifier; the score at the last token of a response is its reward.

    `regression`: squared error of each rated attribute, mean over all ratings of the global batch; rows
    `prompt`, `response`, `attributes` (name → number or null) or HelpSteer2's columns.
    `bradley_terry`: −log σ(r_c − r_r − margin), mean over pairs, where r is the weighted sum of the scores
    and margin = `margin_scale` · (reward of chosen − reward of rejected in the row); rows as for DPO.

    After an evaluation `calibration` has its tables, by prefix and attribute: bins with mean prediction and
    mean rating.

    Args:
        model: a causal language model, which gets a new head, or a sequence classifier, or a name or path.
        args: a `RewardConfig`.
        train_dataset, eval_dataset, processing_class, peft_config, callbacks, optimizers,
            optimizer_cls_and_kwargs: see `SFTTrainer`.
    """

    config_class = RewardConfig
    args: RewardConfig
    no_noise = "it would change the scores of a pair"

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        args = RewardConfig(output_dir="trainer_output") if args is None else args
        if isinstance(args, RewardConfig):  # otherwise the base class raises
            regression = args.objective == "regression"
            self.row_kind: Literal["pair", "rating"] = "rating" if regression else "pair"
            self.needs_rewards = args.margin_scale > 0
            loading = loading_settings(model, args)
            start: Any = model
            if isinstance(model, str):
                dtype = loaded_dtype(args, peft_config)
                start = load_model_named(model, dtype=dtype, reward=True, settings=loading)
            processing_class = tokenizer_in(processing_class) or (
                load_tokenizer_named(model, loading)
                if isinstance(model, str)
                else tokenizer_of(model, loading)
            )
            reward_model: nn.Module = as_reward_model(
                start, attributes=args.attributes, weights=args.reward_weights, seed=args.seed
            )
            processing_class = with_pad_token(processing_class, reward_model)
            model = reward_model
        self._seen: list[dict[str, Any]] = []
        self.calibration: dict[str, dict[str, Table]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.attributes = attributes_of(self.model)
        self.weights = weights_of(self.model)

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """Return the names of the metrics of an evaluation; undefined correlations are missing."""
        if args.objective == "regression":
            attributes = list(args.attributes or ())
            attributes += ["reward"] if len(attributes) > 1 else []
            kinds = ("pearson", "spearman", "rmse", "bias", "calibration")
            found = {f"{kind}/{name}" for kind in kinds for name in attributes}
            return found | {"loss", "loss/regression", "accuracy"}
        pairs = {"accuracy", "calibration/pairs"}
        if examples is None or not len(examples.without("rewards")):
            pairs |= {"pearson/gap", "spearman/gap"}
        rewards = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
        return pairs | rewards | {"loss", "loss/bradley_terry"}

    # --- data ---

    def data_options(self, args: BaseConfig) -> dict[str, Any]:
        """Return the attributes and range of ratings; for pairs, every response gets its end token."""
        assert isinstance(args, RewardConfig)
        if args.objective != "regression":
            return {"all_end": True}
        return {"attributes": args.attributes, "rating_range": args.rating_range}

    def _examples(
        self, dataset: Any, tokenizer: Any, args: BaseConfig, name: str
    ) -> Examples | None:
        examples = super()._examples(dataset, tokenizer, args, name)
        if examples is None or examples is dataset:
            return examples
        assert isinstance(args, RewardConfig)
        if self.row_kind == "rating":
            check_rated(examples, args.attributes or (), name)
        else:
            check_pairs(examples, self.needs_rewards, name)
        check_ends(examples, tokenizer, name)
        return examples

    def _collator(self, examples: Examples) -> PackingCollator:
        if self.row_kind == "pair":
            return super()._collator(examples)
        return RatingCollator(self.layout, self.pad_token_id, examples)

    # --- the step ---

    def outputs(self, model: nn.Module, inputs: PackedBatch) -> Tensor:
        """Return the scores `[R, A]` at the responses' last tokens."""
        return response_scores(model, inputs.model_inputs)

    def losses(self, scores: Tensor, batch: PackedBatch) -> StepResult:
        """Return the loss of each example and metrics of pairs (ratings need all evaluation data)."""
        if isinstance(batch, RatingBatch):
            errors = regression_losses(scores, batch.attributes).sum(-1)
            rows = torch.cat([group[:, 0] for group in batch.groups])
            return StepResult({"regression": Term(errors[rows], per="ratings")}, metrics={})
        rewards = scores @ self.weights.to(scores)
        (pairs,) = batch.groups
        chosen, rejected = rewards[pairs].unbind(-1)
        loss = bradley_terry_loss(chosen, rejected, self._margin(pairs, batch))
        gap = (chosen - rejected).detach()
        return StepResult(
            {"bradley_terry": Term(loss, per="examples")},
            metrics={
                "accuracy": (gap > 0).to(gap.dtype),
                "rewards/chosen": chosen.detach(),
                "rewards/rejected": rejected.detach(),
                "rewards/margins": gap,
            },
        )

    def _margin(self, pairs: Tensor, batch: PackedBatch) -> Tensor | None:
        if not self.needs_rewards:
            return None
        assert batch.rewards is not None  # `check_pairs`
        given = batch.rewards[pairs]
        margin: Tensor = self.args.margin_scale * (given[:, 0] - given[:, 1])
        return margin

    # --- evaluation ---

    def evaluated(self, batch: PackedBatch, outputs: StepOutputs) -> None:
        """Collect the scores for the correlations."""
        if bool(batch.weights.any()):  # not the filler of a rank without examples
            self._seen += self._predictions(outputs.per_response, batch)

    def _predictions(self, scores: Tensor, batch: PackedBatch) -> list[dict[str, Any]]:
        if isinstance(batch, RatingBatch):
            columns = batch.prompt_keys, scores.tolist(), batch.attributes.tolist()
            return [
                {"prompt": prompt, "scores": found, "ratings": rated}
                for prompt, found, rated in zip(*columns, strict=True)
            ]
        (pairs,) = batch.groups
        rewards = (scores @ self.weights.to(scores))[pairs]
        gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
        if batch.rewards is None:
            return [{"gap": gap, "target": None} for gap in gaps]
        given = batch.rewards[pairs]
        targets = (given[:, 0] - given[:, 1]).tolist()
        return [{"gap": g, "target": t} for g, t in zip(gaps, targets, strict=True)]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add accuracy, correlations and calibration over all ranks."""
        self._seen = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        rows, self._seen = self._gathered(self._seen), []
        found, self.calibration[prefix] = self._agreement(rows)
        metrics: dict[str, float] = output.metrics or {}
        metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output._replace(metrics=metrics)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Skip the comparison if the metric is undefined, such as a correlation with a constant."""
        wanted = self.args.metric_for_best_model
        name = f"eval_{(wanted or '').removeprefix('eval_')}"
        if wanted is None or name in metrics:
            return super()._determine_best_metric(metrics, trial)
        if is_main():
            logger.warning(
                "%s is undefined in the evaluation of step %d: the step is not compared with the best one",
                name, self.state.global_step,
            )  # fmt: skip
        return False

    def _gathered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.args.world_size == 1:
            return rows
        from accelerate.utils import gather_object

        return gather_object(rows)  # type: ignore[no-any-return]

    def _agreement(self, rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Table]]:
        if self.row_kind == "rating":
            return rating_metrics(
                np.array([row["scores"] for row in rows]),
                np.array([row["ratings"] for row in rows]),
                self.attributes,
                self.weights.numpy(),
                [row["prompt"] for row in rows],
            )
        targets = [row["target"] for row in rows]
        known = None if None in targets else np.array(targets)
        return pair_metrics(np.array([row["gap"] for row in rows]), known)
