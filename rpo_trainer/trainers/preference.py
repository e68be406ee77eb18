"""DPO and RPO trainers; the losses are entries of `rpo_trainer.losses`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpo_trainer.data.ragged import Ragged
from rpo_trainer.errors import DataError, RecipeError, RunError
from rpo_trainer.losses import LOSSES, more_than_pairs
from rpo_trainer.models.adapter_parts import warn_of_random
from rpo_trainer.models.adapters import starts_as
from rpo_trainer.models.loading import load_model_named
from rpo_trainer.models.preload_checks import check_same_vocabulary
from rpo_trainer.models.sharding import has_shards, is_replicated, num_rows
from rpo_trainer.models.unwrap import transformers_model, unwrap_prepared_model
from rpo_trainer.runtime.distributed import all_gather_dict, broadcast, is_main, on_main
from rpo_trainer.runtime.row_progress import RowProgress
from rpo_trainer.step import reference
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.step.layout_probe import probe_on_all_ranks
from rpo_trainer.step.reference_cache import ReferenceCache
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.config import DPOConfig, PreferenceConfig, RPOConfig
from rpo_trainer.trainers.early_warnings import EarlyWarnings
from rpo_trainer.trainers.engine import shard_reference
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.fits import check_fit
from rpo_trainer.trainers.preference_terms import preference_terms
from rpo_trainer.trainers.setup import loaded_dtype, loading_settings
from rpo_trainer.trainers.step_result import StepResult
from rpo_trainer.trainers.step_zero import StepZero

logger = logging.getLogger(__name__)

_REFERENCE_FILE = "reference.json"


class PreferenceTrainer(BaseTrainer):
    """Base of DPO and RPO trainers: reference log-probs, step-0 check, loss and metrics.

    Args:
        model: a causal language model, or its name or path.
        ref_model: the reference model; None: the policy at the start of training.
        args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, optimizers: see
            `SFTTrainer`. Rows: `prompt`, `chosen`, `rejected`, or `prompt`, `responses`, or tokenized.
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    row_kind: Literal["sft", "pair"] = "pair"
    token_metrics: Literal["tokens", "preferences"] | None = "preferences"
    args: PreferenceConfig
    no_noise = "the reference model has none"

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if isinstance(ref_model, str):
            ref_model = load_model_named(
                ref_model,
                dtype=loaded_dtype(self.args, peft_config),
                settings=loading_settings(ref_model, self.args),
            )
        elif ref_model is not None and ref_model is not model:
            ref_model = unwrap_prepared_model(ref_model)
        if ref_model is not model and any(ref_model is part for part in self.model.modules()):
            raise RecipeError(
                "ref_model is the base model of the policy's adapter",
                code="model.reference-in-policy",
                why="its outputs include the adapter, which is trained",
                fix="remove ref_model (the policy at the start is used), or load the reference model "
                "separately",
            )
        self.ref_model: Any = None
        if isinstance(ref_model, nn.Module) and ref_model is not model:
            self.ref_model = ref_model
            warn_of_random(ref_model)
            self._check_vocabulary(ref_model)
            for name, examples in self._data_sets().items():
                check_fit(ref_model, examples, name, whose="the reference")
        for name, examples in self._data_sets().items():
            self._check_rows(name, examples)
        self._policy_key: str | None = None
        self._reference_key: str | None = None
        self._reference_is_policy = False
        self._step_zero: StepZero | None = None
        if not any(isinstance(c, EarlyWarnings) for c in self.callback_handler.callbacks):
            self.add_callback(EarlyWarnings())

    # --- data ---

    def _data_sets(self) -> dict[str, Examples]:
        evaluation = self.eval_dataset
        if isinstance(evaluation, dict):
            evaluation = {f"eval_{name}": examples for name, examples in evaluation.items()}
        else:
            evaluation = {"eval": evaluation}
        sets = {"train": self.train_dataset, **evaluation}
        return {name: examples for name, examples in sets.items() if examples is not None}

    def _check_rows(self, name: str, examples: Examples) -> None:
        counts = examples.response_counts()
        if (counts < 2).any():
            raise DataError(
                f"{int((counts < 2).sum())} rows of the {name} data have only one response",
                code="data.response-count",
                details={"data": name, "rows": int((counts < 2).sum())},
                why="a preference needs two responses to the same prompt",
                fix="add a second response to these rows, or remove them",
            )
        if LOSSES[self.args.loss_type].pairs_only and (counts != 2).any():
            raise DataError(
                f"{int((counts != 2).sum())} rows of the {name} data have more than two responses",
                code="data.response-count",
                details={"data": name, "rows": int((counts != 2).sum())},
                why=f"the loss {self.args.loss_type} is for pairs",
                fix="use pairs (best and worst response), or a loss for more responses: "
                + ", ".join(more_than_pairs()),
            )
        if self.needs_rewards:
            missing = examples.without("rewards").tolist()
            if missing:
                raise DataError(
                    f"{len(missing)} rows of the {name} data have no rewards, the first at {missing[:3]}",
                    code="data.missing-rewards",
                    details={"data": name, "rows": missing},
                    why="the target gap of RPO is computed from the rewards",
                    fix="add chosen_reward and rejected_reward (or rewards), or use DPO",
                )

    # --- reference ---

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        """Compute a key of the policy's weights, before they are cast or sharded."""
        if self._policy_key is None:
            self._policy_key = self._key_of(self.model)

    def policy_ready(self, resume_from_checkpoint: str | None) -> None:
        """Compute the reference log-probs of all data, while the policy has its initial weights."""
        if self._reference_key is None:
            self._prepare_reference()
        at_start = resume_from_checkpoint is None and self.state.global_step == 0
        if at_start and self._reference_is_policy and self.args.step0_check:
            self._step_zero = self._watch_step_zero()
        if resume_from_checkpoint is not None:
            self._check_same_reference(Path(resume_from_checkpoint))

    def _prepare_reference(self) -> None:
        """Compute `reference_logps`, and whether the reference model is the initial policy."""
        model = self.model
        if self._policy_key is None:
            self._policy_key = self._key_of(self.model)
        key = self._policy_key
        same_start = self.ref_model is not None and starts_as(self.model, self.ref_model)
        if self.ref_model is not None:
            key = self._key_of(self.ref_model)
            model = shard_reference(self.ref_model, self.accelerator)
            alike = type(transformers_model(model)) is type(transformers_model(self.model))
            layout, _ = probe_on_all_ranks(
                model, layout=self.layout if alike else None, logits_chunk_bytes=self.args.logits_chunk_bytes,
                longest=self.data.longest, autocast=self.args.mixed_precision_dtype(),
                whose="the reference",
            )  # fmt: skip
            self._reference_layout = layout
        folder = Path(
            self.args.reference_cache_dir or Path(str(self.args.output_dir)) / "reference-cache"
        )
        cache = on_main(lambda: ReferenceCache(folder / key))
        for examples in self._data_sets().values():
            examples.extra["reference_logps"] = self._reference_of(model, examples, cache)
        self._reference_key = key
        if self.ref_model is not None:
            self.ref_model = self.ref_model.to("cpu") if is_replicated(model) else None
            if key != self._policy_key and not same_start:
                logger.info(
                    "step-0 check: off, because the reference model is not the initial policy"
                )
        self._reference_is_policy = same_start or key == self._policy_key

    def _key_of(self, model: nn.Module) -> str:
        """Return a key of the weights, equal on all ranks; computed on the main one unless sharded."""
        key = ""
        if is_main() or has_shards(model):
            key = reference.model_key(model, arithmetic=str(self.args.mixed_precision_dtype()))
        return broadcast(key)

    def _reference_of(self, model: nn.Module, examples: Examples, cache: ReferenceCache) -> Ragged:
        args = self.args
        dtype = args.mixed_precision_dtype() or next(model.parameters()).dtype
        main, bar = args.process_index == 0, not args.disable_tqdm
        with (
            self.accelerator.autocast(),
            RowProgress(None, "reference log-probs", show=main, bar=bar) as progress,
        ):
            return reference.dataset_logprobs(
                model,
                examples.view,
                layout=self.layout if model is self.model else self._reference_layout,
                cache=cache,
                batch_tokens=args.reference_batch_tokens,
                pad_token_id=self.pad_token_id,
                shard=(args.process_index, args.world_size),
                gather=all_gather_dict,
                progress=progress,
                tolerance=0.1 if dtype in (torch.bfloat16, torch.float16) else 1e-3,
            )

    def _check_vocabulary(self, model: nn.Module) -> None:
        policy = num_rows(self.model.get_input_embeddings().weight)
        other = num_rows(model.get_input_embeddings().weight)  # type: ignore[operator]
        check_same_vocabulary(policy, other)

    def _check_same_reference(self, folder: Path) -> None:
        path = folder / _REFERENCE_FILE
        if path.is_file() and json.loads(path.read_text())["key"] != self._reference_key:
            raise RunError(
                "the reference model is not the one of this checkpoint",
                code="run.other-reference",
                where=str(folder),
                why="with ref_model=None the reference model is the model that is passed, which has changed",
                fix="pass the model that the run started from as model or ref_model",
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            (Path(output_dir) / _REFERENCE_FILE).write_text(
                json.dumps({"key": self._reference_key})
            )

    def _eval_examples(self, eval_dataset: Any) -> Examples:
        examples = super()._eval_examples(eval_dataset)
        if "reference_logps" in examples.extra:
            return examples
        if self._reference_key is None:
            self._prepare_reference()
        if "reference_logps" not in examples.extra:
            # A new data set: the reference model must still be available.
            self._check_rows("eval", examples)
            model = self.ref_model
            if model is None and self.state.global_step == 0:
                model = self.model
            if model is None:
                raise RecipeError(
                    "reference log-probs of new evaluation data cannot be computed after training",
                    code="training.reference-gone",
                    where="eval_dataset",
                    why="the reference model is the initial policy, whose weights have changed",
                    fix="pass eval_dataset or ref_model to the constructor",
                )
            examples.extra["reference_logps"] = self._reference_of(
                model if self.engine.wraps_late else model.to(self.args.device),
                examples,
                ReferenceCache(None),
            )
        return examples

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """Return the metrics of an evaluation."""
        names = super().metric_names(args, examples) | {"loss/preference", "loss/sft", *_METRICS}
        return names | {*_TARGET_METRICS} if cls.needs_rewards else names

    # --- the step ---

    def _watch_step_zero(self) -> StepZero:
        return StepZero(
            self.model,
            self.args,
            layout=self.layout,
            has_ref_model=self.ref_model is not None,
            use_rewards=self.needs_rewards,
            reduce=self._reduce,
            autocast=self.accelerator.autocast,
        )

    def before_update(self) -> bool:
        """Run the guards, and the step-0 check before the first update."""
        taken = super().before_update()
        if self._step_zero is not None:
            check, self._step_zero = self._step_zero, None
            if taken:
                self.step_zero = check.finish()
            else:
                self._step_zero = (
                    self._watch_step_zero()
                )  # weights are unchanged: check the next batch
        return taken

    def losses(self, sums: Tensor, batch: PackedBatch) -> StepResult:
        """Return the preference loss and weighted SFT loss of each example, see `preference_terms`."""
        result = preference_terms(self.args, sums, batch, needs_rewards=self.needs_rewards)
        if self._step_zero is not None and self.model.training:
            self._step_zero.add(sums, batch, result.terms["preference"].numerators)
        return result


_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/chosen_delta", "logps/rejected_delta",
    "logps/chosen_falling",
)  # fmt: skip
_TARGET_METRICS = ("rewards/target_gap", "rewards/gap_error", "rewards/target_saturated")


class DPOTrainer(PreferenceTrainer):
    """Direct Preference Optimization with a weighted SFT loss on the chosen responses.

    Per example: `dpo` (or `ipo`) loss + `sft_loss_weight` · SFT loss of the chosen response. Plain DPO often
    lowers the likelihood of both responses while the gap grows; the SFT loss counteracts this.
    """

    config_class = DPOConfig


class RPOTrainer(PreferenceTrainer):
    """Reward-aware Preference Optimization: the implicit reward gap is fitted to the target gap.

    Rows need rewards: `chosen_reward` and `rejected_reward`, or `rewards` for K responses.
    """

    config_class = RPOConfig
    needs_rewards = True
