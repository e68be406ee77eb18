"""What every trainer does alike: data, step, metrics, guards and checkpoints, on `transformers.Trainer`."""

from __future__ import annotations

import logging
import shutil
import sys
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from rpo_trainer.batch import Layout
from rpo_trainer.errors import DataError, RecipeError, RunError
from rpo_trainer.logprobs import response_sums
from rpo_trainer.order import StepBatchSampler
from rpo_trainer.probe import probe
from rpo_trainer.step import token_logprobs
from rpo_trainer.trainers import checkpoint
from rpo_trainer.trainers.config import StepConfig
from rpo_trainer.trainers.examples import EpochLoader, Examples, PackingCollator, to_device
from rpo_trainer.trainers.guards import BeforeUpdate, require_finite
from rpo_trainer.trainers.metrics import MetricSums
from rpo_trainer.trainers.setup import (
    pad_token_id_of,
    require_one_gpu,
    tokenizer_of,
    with_adapter,
)

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


@dataclass
class Term:
    """One term of the loss: Σ over examples of `numerators`, divided by a count of the global batch.

    Attributes:
        numerators: `[B]`, with gradient where `coefficient` is not 0.
        per: what it is a mean over: `examples`, or `tokens` (trained ones of the first responses).
    """

    numerators: Tensor
    per: str
    coefficient: float = 1.0


@dataclass
class StepResult:
    """Terms of the loss by name, and further metrics, each `[B]` in the order of the groups."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor]


class PackedTrainer(Trainer):
    """Base of the trainers; a subclass says what the losses are and what its rows look like."""

    config_class: type[StepConfig] = StepConfig
    row_kind: Literal["sft", "pair"] = "sft"
    needs_rewards = False
    args: StepConfig
    # transformers types these as unions with None and with data sets we never hold.
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: StepConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="trainer_output")
        if not isinstance(args, self.config_class):
            raise RecipeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(args).__name__}"
            )
        require_one_gpu(args)
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            # The adapter's random start is part of the run: a resumed one needs the same again.
            set_seed(args.seed)
            model = with_adapter(model, peft_config)
        processing_class = processing_class or tokenizer_of(model)
        self.audits: dict[str, Any] = {}
        train = self._examples(train_dataset, processing_class, args, "train")
        evaluation = (
            {
                name: self._examples(d, processing_class, args, f"eval_{name}")
                for name, d in eval_dataset.items()
            }
            if isinstance(eval_dataset, dict)
            else self._examples(eval_dataset, processing_class, args, "eval")
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=PackingCollator("padded", 0),  # replaced below: it depends on the probe
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our loss is already divided by the counts of the whole accumulated global batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.layout: Layout
        wanted = None if args.layout == "auto" else args.layout
        self.layout, _ = probe(self.model, layout=wanted, tile_bytes=args.tile_bytes)  # type: ignore[arg-type]
        self.pad_token_id = pad_token_id_of(processing_class)
        self.data_collator = PackingCollator(self.layout, self.pad_token_id)
        self._train_metrics = MetricSums()
        self._eval_metrics = MetricSums()
        self._step_losses: list[tuple[Tensor, list[str]]] = []
        self._grad_norm: Tensor | float = 0.0
        self._staging: Path | None = None
        self.add_callback(BeforeUpdate(self.before_update))

    # --- what a subclass says ---

    @abstractmethod
    def losses(self, sums: Tensor, batch: dict[str, Any]) -> StepResult:
        """Terms and metrics from `[R]` summed log-probs and a batch of `PackingCollator`."""

    def before_update(self) -> None:
        """Runs before each optimizer step, gradients in place; raises to keep the optimizer still."""
        self._check_finite()

    # --- data ---

    def _examples(
        self, dataset: Any, tokenizer: Any, args: StepConfig, name: str
    ) -> Examples | None:
        if dataset is None or isinstance(dataset, Examples):
            return dataset
        from rpo_trainer.data import Audit, prepare_dataset

        audit = self.audits[name] = Audit()
        rows = prepare_dataset(
            dataset,
            tokenizer,
            kind=self.row_kind,
            max_length=sys.maxsize if args.max_length is None else args.max_length,
            truncation=args.truncation,  # type: ignore[arg-type]
            require_rewards=self.needs_rewards,
            audit=audit,
        )
        for line in audit.summary_lines():
            logger.info("%s data: %s", name, line)
        if not len(rows):
            raise DataError(
                f"no example of the {name} data is left",
                why="; ".join(audit.summary_lines()) or "the data set is empty",
            )
        return Examples(rows)

    def _loader(self, examples: Examples, sampler: StepBatchSampler) -> DataLoader[Any]:
        args = self.args
        return EpochLoader(
            examples,
            batch_sampler=sampler,
            collate_fn=PackingCollator(self.layout, self.pad_token_id, examples),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank; the sampler itself shards, so accelerate must not."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        micro = self._train_batch_size
        sampler = StepBatchSampler(
            self.train_dataset.costs(self.layout),
            global_batch_size=micro * args.gradient_accumulation_steps * args.world_size,
            micro_batch_size=micro,
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle,
            drop_last=args.dataloader_drop_last,
        )
        return self._loader(self.train_dataset, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Micro-batches of this rank, longest first."""
        examples = self._eval_examples(eval_dataset)
        args = self.args
        sampler = StepBatchSampler(
            examples.costs(self.layout),
            global_batch_size=args.eval_batch_size * args.world_size,
            micro_batch_size=args.eval_batch_size,
            world_size=args.world_size,
            rank=args.process_index,
            shuffle=False,
        )
        return self._loader(examples, sampler)

    def _eval_examples(self, eval_dataset: Any) -> Examples:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        examples = self._examples(eval_dataset, self.processing_class, self.args, "eval")
        if examples is None:
            raise ValueError("evaluation needs an eval_dataset")
        return examples

    # --- the step ---

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and the counts of the whole global batch `[2]`."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step of all: transformers would notice one step too late.
            self.control.should_training_stop = True
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        counts = torch.stack([batch["counts"] for batch in batches]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves tensors, and leaves their dtype: rewards and log-probs stay float32 under DeepSpeed."""
        return to_device(inputs, self.args.device)  # type: ignore[no-any-return]

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Loss of one micro-batch, scaled so that the sum over micro-batches and ranks is the batch's."""
        logps = token_logprobs(model, inputs["model_inputs"])
        sums = response_sums(logps, inputs["response_index"], len(inputs["response_tokens"]))
        result = self.losses(sums, inputs)
        training = num_items_in_batch is not None
        counts = inputs["counts"] if num_items_in_batch is None else num_items_in_batch
        counts = counts.clamp_min(1)
        weights = inputs["weights"]
        metrics = self._train_metrics if training else self._eval_metrics
        loss = sums.new_zeros(())
        for name, term in result.terms.items():
            numerator = (term.numerators * weights).sum()
            position = 0 if term.per == "examples" else 1
            metrics.add_ratio(f"loss/{name}", numerator, inputs["counts"][position])
            if term.coefficient:
                loss = loss + term.coefficient * numerator / counts[position].to(numerator.dtype)
        for name, values in result.metrics.items():
            metrics.add(name, values, weights)
        self._coefficients = {f"loss/{name}": t.coefficient for name, t in result.terms.items()}
        if training:
            self._step_losses.append((loss.detach(), inputs["ids"]))
            loss = loss * self.args.world_size  # the engines average gradients over ranks
        if not return_outputs:
            return loss
        gaps = {
            short: result.metrics[name]
            for name, short in (
                ("rewards/margins", "implicit_gap"),
                ("rewards/target_gap", "target_gap"),
            )
            if name in result.metrics
        }
        return loss, {"logps": sums.detach(), "gaps": gaps}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss of one evaluation micro-batch; its metrics go to the sums."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop, with means over all examples of all ranks in place of its loss."""
        self._eval_metrics.drain()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._eval_metrics.drain(self._reduce)
        metrics: dict[str, float] = output.metrics or {}
        metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        metrics[f"{prefix}_loss"] = sum(
            coefficient * means[name] for name, coefficient in self._coefficients.items()
        )
        return output._replace(metrics=metrics)

    def _reduce(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        return self.accelerator.reduce(sums, reduction="sum")  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds our metrics to a training log line: means over all examples since the last one."""
        if "loss" in logs:
            logs.update(self._train_metrics.drain(self._reduce))
        super().log(logs, start_time)

    # --- guards ---

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return self._grad_norm

    def _check_finite(self) -> None:
        losses, self._step_losses = self._step_losses, []
        # A loss scaler (float16) meets infinite gradients by design, and skips the step itself.
        scaled = self.accelerator.scaler is not None
        require_finite(
            losses,
            0.0 if scaled else self._grad_norm,
            step=self.state.global_step + 1,
            reduce=self._reduce,
        )

    # --- checkpoints ---

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Without transformers' pickle of the arguments: it names absolute paths, and nobody reads it."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = output / checkpoint.STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            if best and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(output / Path(best).name)
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            checkpoint.commit(staging / name, output / name)
            shutil.rmtree(staging, ignore_errors=True)
            checkpoint.rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """`transformers.Trainer.train`; `True` resumes from the newest complete checkpoint."""
        if resume_from_checkpoint is True:
            found = checkpoint.last_complete(Path(str(self.args.output_dir)))
            if found is None:
                raise RunError(
                    "there is no complete checkpoint to resume from", where=self.args.output_dir
                )
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            checkpoint.require_complete(Path(resume_from_checkpoint))
        self._train_metrics, self._step_losses = MetricSums(), []
        self.before_training(resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        """Runs before the loop starts, the model as it was given."""
