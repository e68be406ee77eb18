"""What every trainer does alike: data, step, metrics, guards and checkpoints, on `transformers.Trainer`."""

from __future__ import annotations

import contextlib
import logging
import sys
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from rpo_trainer.errors import DataError
from rpo_trainer.models.adapters import randomized_zero_init
from rpo_trainer.models.loading import load_model_named, load_tokenizer_named
from rpo_trainer.models.sharding import whole_on_every_rank
from rpo_trainer.models.unwrap import transformers_model, unwrap_prepared_model
from rpo_trainer.runtime.cores import OtherProcesses, limit_threads
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.runtime.memory import keeping_freed_memory
from rpo_trainer.step.batch import Layout, to_device
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.layout_probe import probe_on_all_ranks
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.router_loss import asked_by_config
from rpo_trainer.trainers.best import require_best_metric
from rpo_trainer.trainers.compiled import compile_if_asked
from rpo_trainer.trainers.counting import flops_per_token, forward_tokens_of
from rpo_trainer.trainers.examples import Examples, PackingCollator
from rpo_trainer.trainers.fits import check_all_fit, check_fit, check_layout, longest_text
from rpo_trainer.trainers.guards import StepGuard
from rpo_trainer.trainers.loaders import eval_loader, train_loader
from rpo_trainer.trainers.metrics import MetricSums
from rpo_trainer.trainers.names import answering_unknown_arguments
from rpo_trainer.trainers.noise import disable_noise, say_noise
from rpo_trainer.trainers.router_term import NAME as ROUTER_AUX
from rpo_trainer.trainers.router_term import RouterTerm, router_term
from rpo_trainer.trainers.saving import SavingTrainer
from rpo_trainer.trainers.setup import (
    note_defaults,
    pad_token_id_of,
    require_config,
    require_one_gpu,
    set_checkpointing,
    tokenizer_in,
    tokenizer_of,
    with_adapter,
)
from rpo_trainer.trainers.step_config import BaseConfig
from rpo_trainer.trainers.trackers import fault_tolerant_callbacks

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


@dataclass
class Term:
    """One term of the loss: Σ over examples of `numerators`, divided by a count of the global batch.

    Attributes:
        numerators: `[B]`, with gradient where `coefficient` is not 0.
        per: what it is a mean over: `examples`, or what `counts` counts beside them: `tokens` (trained
            ones of the first responses) or `ratings`.
    """

    numerators: Tensor
    per: str
    coefficient: float = 1.0


@dataclass
class StepResult:
    """Terms of the loss by name, and further metrics, each `[B]` in the order of the groups."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor]


class PackedTrainer(SavingTrainer):
    """Base of the trainers; a subclass says what the losses are and what its rows look like."""

    config_class: type[BaseConfig] = BaseConfig
    row_kind: Literal["sft", "pair", "rating"] = "sft"
    needs_rewards = False
    no_noise = ""  # with `disable_dropout`: why there can be none
    args: BaseConfig
    # transformers types these as unions with None and with data sets we never hold.
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = answering_unknown_arguments(cls.__init__)  # type: ignore[method-assign]

    @answering_unknown_arguments
    def __init__(
        self,
        model: str | nn.Module,
        args: BaseConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="trainer_output")
        require_config(self, args)
        require_one_gpu(args)
        limit_threads()
        self._other_processes = OtherProcesses()
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer_named(model)
            model = load_model_named(model)
        model = with_adapter(unwrap_prepared_model(model), peft_config, args.seed)
        processing_class = tokenizer_in(processing_class) or tokenizer_of(model)
        set_checkpointing(model, args)
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
        check_all_fit(model, train, evaluation)
        self._longest = longest_text(model, train, evaluation)
        if evaluation is not None:
            sets = evaluation if isinstance(evaluation, dict) else {None: evaluation}
            require_best_metric(
                args,
                {name: self.metric_names(args, examples) for name, examples in sets.items()},
                asked=bool(asked_by_config(transformers_model(model).config)),
            )
        use_cache = getattr(transformers_model(model).config, "use_cache", None)
        with fault_tolerant_callbacks(args) as trackers:
            super().__init__(
                model=model,
                args=args,
                data_collator=PackingCollator("padded", 0),  # replaced below, as the probe says
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=processing_class,
                callbacks=[*trackers, *(callbacks or [])],
                optimizers=optimizers,
            )
        self.neftune_noise_alpha = None  # transformers' noise takes a packed row for one example
        # Our loss is already divided by the counts of the whole accumulated global batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.apply_engine_overrides()
        self.prepare_output(use_cache)
        self.layout: Layout = "shared" if args.layout == "auto" else args.layout  # type: ignore[assignment]
        self._probed = False
        self.router: RouterTerm | None = None
        if whole_on_every_rank(self.model):
            self._probe()
            compile_if_asked(self.model, self.accelerator)
        self.pad_token_id = pad_token_id_of(processing_class)
        self.data_collator = PackingCollator(self.layout, self.pad_token_id)
        self._train_metrics = MetricSums()
        self._eval_metrics = MetricSums()
        self.step_guard = StepGuard(args.nonfinite)

    def _probe(self) -> None:
        wanted: Any = None if self.args.layout == "auto" else self.args.layout
        with randomized_zero_init(self.model):
            self.layout, _ = probe_on_all_ranks(
                self.model, layout=wanted, logits_chunk_bytes=self.args.logits_chunk_bytes,
                longest=self._longest,
                autocast=self.args.mixed_precision_dtype(),
            )  # fmt: skip
        self.router = router_term(self.model, self.args, self._reduce)
        if getattr(self.args, "disable_dropout", False):
            disable_noise(self.model, self.no_noise)
        else:
            say_noise(self.model)
        self._probed = True

    def wrapped(self, train_dataloader: Any) -> Any:
        """Asks weights that were not whole before; the loader was dealt by the costs of a guess."""
        if self._probed:
            return train_dataloader
        self._probe()
        compile_if_asked(self.model, self.accelerator)
        self.data_collator = self._collator(self.train_dataset)
        return self.get_train_dataloader()

    # --- what a subclass says ---

    @abstractmethod
    def losses(self, sums: Tensor, batch: dict[str, Any]) -> StepResult:
        """Terms and metrics from `outputs` and a batch of `PackingCollator`."""

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What the losses are made of, for each response: `[R]` summed log-probs."""
        logps = token_logprobs(model, inputs["model_inputs"])
        return response_sums(logps, inputs["response_index"], len(inputs["response_tokens"]))

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Runs before the forward of a micro-batch, in training and evaluation."""

    def data_options(self, args: BaseConfig) -> dict[str, Any]:
        """Further arguments of `prepare_dataset`."""
        return {}

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """The metrics of an evaluation, without the prefix: what `metric_for_best_model` may name.

        A subclass with further terms of the loss or metrics adds their names.

        Args:
            examples: what is evaluated on; None: not known yet.
        """
        return {"loss"}

    def before_update(self) -> bool:
        """Runs before each optimizer step, gradients in place; raises to keep the optimizer still.

        Returns:
            Whether the step is taken; False: it is left out, and there is no gradient any more.
        """
        # A loss scaler (float16) meets infinite gradients by design, and skips the step itself.
        scaled = self.accelerator.scaler is not None
        taken = self.step_guard.judge(
            0.0 if scaled else self._grad_norm,
            step=self.state.global_step + 1,
            reduce=self._reduce,
        )
        if not taken:
            self.model.zero_grad(set_to_none=True)  # optimizers pass over weights without one
            self._train_metrics, loss = self._before_step
            self._tr_loss.copy_(loss)
        return taken

    # --- data ---

    def _examples(
        self, dataset: Any, tokenizer: Any, args: BaseConfig, name: str
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
            special_tokens=args.special_tokens,  # type: ignore[arg-type]
            chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
            **self.data_options(args),
            audit=audit,
        )
        if args.process_index == 0:
            audit.log(logger, f"{name}_dataset", f"{name} data: ")
        if not len(rows):
            raise DataError(
                f"no example of the {name} data is left",
                why="; ".join(audit.summary_lines()) or "the data set is empty",
                fix="correct the rows that were dropped, or change what drops them (max_length, truncation)",
            )
        return Examples(rows)

    def _collator(self, examples: Examples) -> PackingCollator:
        return PackingCollator(self.layout, self.pad_token_id, examples)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank; the sampler itself shards, so accelerate must not."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        examples = self.train_dataset
        return train_loader(examples, self.args, self._collator(examples), self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Micro-batches of this rank, longest first."""
        examples = self._eval_examples(eval_dataset)
        return eval_loader(examples, self.args, self._collator(examples))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """For `predict`, which gives the metrics of other data and no predictions."""
        return self.get_eval_dataloader(test_dataset)

    def _eval_examples(self, eval_dataset: Any) -> Examples:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        examples = self._examples(eval_dataset, self.processing_class, self.args, "eval")
        if examples is None:
            raise ValueError("evaluation needs an eval_dataset")
        if eval_dataset is not examples:
            check_fit(self.model, examples, "eval")
        check_layout(self.model, examples, self.layout, self._longest)
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
        if self.step_guard.limit:
            self._before_step = self._train_metrics.copy(), self._tr_loss.clone()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        if self.router is not None:
            self.router.begin_step(batches)
        counts = torch.stack([batch["counts"] for batch in batches]).sum(0)
        counts = counts.to(device, non_blocking=True)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def get_total_train_batch_size(self, args: Any) -> int:
        """Examples of one optimizer step, over all ranks."""
        if args.micro_batch_tokens is not None:
            return int(args.examples_per_step())
        return int(super().get_total_train_batch_size(args))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; with a token budget of all those of the step."""
        if self.router is not None:
            model.train()
            self.router.prepare(lambda batch: self._router_sums(model, batch))
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        batches, accelerator = inputs["micro_batches"], self.accelerator
        # An engine of its own counts its backward passes; DDP and FSDP reduce with the last one.
        always = (
            accelerator.distributed_type == DistributedType.DEEPSPEED
            or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        )
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches, 1):
            accelerator.sync_gradients = last = number == len(batches)
            with contextlib.nullcontext() if last or always else accelerator.no_sync(model):
                total += super().training_step(model, batch, num_items_in_batch)
        return total

    def _router_sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Sums of the routers' loss of a micro-batch, from a forward of nothing else."""
        assert self.router is not None
        inputs = self._prepare_inputs(batch)
        self.before_forward(inputs)
        with self.compute_loss_context_manager():
            return self.router.sums_only(model, inputs)

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
        self.before_forward(inputs)
        if self.router is not None:
            self.router.request(inputs)
        sums = self.outputs(model, inputs)
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
        if self.router is not None:
            balance, share = self.router.share(inputs, training)
            if training:
                metrics.add_ratio(ROUTER_AUX, balance, share)
            loss = loss + self.router.coefficient * balance.to(loss.dtype)
            self._coefficients[ROUTER_AUX] = self.router.coefficient
        if training:
            self.step_guard.add(loss.detach(), inputs["ids"])
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
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self.evaluated(inputs, outputs)
        return loss.detach(), None, None

    def evaluated(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Called with each evaluation micro-batch and what `compute_loss` has found for it."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop, with means over all examples of all ranks in place of its loss."""
        self._eval_metrics.drain()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._eval_metrics.drain(self._reduce)
        if self.router is not None:
            means[ROUTER_AUX] = self.router.evaluated()
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
            self.step_guard.mend(logs)
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Adds the tokens of a training forward, or of all those of a step, of all ranks."""
        wanted = self.args.include_num_input_tokens_seen
        if wanted != "no":
            tokens = forward_tokens_of(inputs, padding=wanted == "all")
            seen = self._reduce(torch.tensor(float(tokens), device=self.args.device).double())
            self.state.num_input_tokens_seen += int(seen)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """An estimate of the operations of a training forward and backward on this rank."""
        return self._flops_per_token * forward_tokens_of(inputs, padding=True)

    # --- guards ---

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return self._grad_norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.step_guard.write(Path(output_dir))

    # --- training ---

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """`transformers.Trainer.train`; `True` resumes from the newest complete checkpoint.

        None: from `args.resume_from_checkpoint`, where that is set.
        """
        wanted = resume_from_checkpoint
        resume = self.checkpoint_to_resume(
            self.args.resume_from_checkpoint if wanted is None else wanted
        )
        self._flops_per_token = flops_per_token(self.model)
        note_defaults(self.args)
        self.written.remember()
        self._train_metrics = MetricSums()
        self.step_guard.begin(resume)
        self.before_training(resume)
        if not self.wraps_late:
            self.policy_ready(resume)
        on_cpu = self.args.device.type == "cpu"
        if on_cpu and is_main():
            self._other_processes.report()
        with keeping_freed_memory() if on_cpu else contextlib.nullcontext():
            return super().train(resume_from_checkpoint=resume, **kwargs)

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        """Runs before the loop starts, the model as it was given."""
