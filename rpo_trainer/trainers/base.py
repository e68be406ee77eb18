"""`BaseTrainer`: the training loop that all trainers share, on `transformers.Trainer`.

The steps of `train()` in order, each with its method. (T): method of `transformers.Trainer`, not overridden;
[hook]: method for subclasses to override or extend.

    __init__                      config, model, tokenizer and rows are prepared and checked; (T) the rest
      DataSets, tokenized           rows to token ids; dropped rows are counted
      Engine, OutputWriter          DDP, FSDP2 or DeepSpeed is set up; output is checked to be writable
      _prove_layout                 the fastest layout that reproduces plain forward passes
    train
      checkpoints.to_resume         a complete checkpoint of this engine
      before_training        [hook] the model as it was passed
      get_train_dataloader          packed micro-batches of this rank
      _prepare_for_training         model, optimizer and schedule are wrapped; a checkpoint is loaded
        policy_ready         [hook] reference log-probs, with the initial weights
      for each optimizer step:
        get_batch_samples           its micro-batches, and the counts of the global batch
        training_step               for each micro-batch:
          _prepare_inputs             to the device
          compute_loss
            before_forward   [hook]
            outputs          [hook]   log-probs or scores of the responses
            losses           [hook]   terms of the loss, and metrics
            StepResult.total          the terms divided by the counts of the global batch
          (T) backward              gradients; reduced over ranks with the last micro-batch
        (T) clipping, _get_grad_norm
        before_update        [hook] guards: stop or skip the step before weights are updated
        (T) optimizer, scheduler
        log                         means of the metrics over all ranks, every `logging_steps`
        evaluate, evaluation_loop   every `eval_steps`; for each batch `prediction_step`, `evaluated` [hook]
        _save_checkpoint            every `save_steps`: staged, then moved to its place
      _finalize_training            with `async_save`: waits for the last checkpoint

Engine, guards, files and the load-balancing loss are separate objects: `engine`, `step_guard`, `checkpoints`
and `output`, `router`.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from rpo_trainer.models.sharding import has_shards, is_replicated, reshard
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime.cores import OtherProcesses, limit_threads
from rpo_trainer.runtime.devices import move, widest
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.runtime.memory import keeping_freed_memory
from rpo_trainer.step.batch import Layout, PackedBatch, StepBatch
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.trainers import setup, token_metrics
from rpo_trainer.trainers.background_save import warn_of_early_callbacks
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.checkpoint import (
    Checkpoints,
    keep_hyperparameters_on_load,
    load_into_wrapped,
)
from rpo_trainer.trainers.compiled import compile_layers
from rpo_trainer.trainers.data_sets import DataSets, tokenized
from rpo_trainer.trainers.engine import Engine
from rpo_trainer.trainers.examples import Examples, PackingCollator
from rpo_trainer.trainers.guards import BeforeUpdate, StepGuard
from rpo_trainer.trainers.loaders import eval_loader, train_loader
from rpo_trainer.trainers.metrics import Metrics, MetricSums
from rpo_trainer.trainers.noise import disable_noise, log_noise
from rpo_trainer.trainers.outputs import OutputWriter, not_left_empty
from rpo_trainer.trainers.router_term import NAME as ROUTER_AUX
from rpo_trainer.trainers.router_term import RouterTerm, router_term
from rpo_trainer.trainers.step_result import StepOutputs, StepResult
from rpo_trainer.trainers.trackers import fault_tolerant_callbacks
from rpo_trainer.trainers.unknown_arguments import with_known_arguments

if TYPE_CHECKING:
    from peft import PeftConfig


class BaseTrainer(Trainer):
    """Base class of the trainers; a subclass defines the losses and the kind of rows."""

    config_class: type[BaseConfig] = BaseConfig
    row_kind: Literal["sft", "pair", "rating"] = "sft"
    needs_rewards = False
    token_metrics: Literal["tokens", "preferences"] | None = None  # which of `token_metrics`
    no_noise = ""  # reason for `disable_dropout`
    args: BaseConfig
    # transformers types these as unions with None and with other data sets.
    model: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    data_collator: Any
    _grad_norm: Tensor | float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = with_known_arguments(cls.__init__)  # type: ignore[method-assign]

    @with_known_arguments
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
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="trainer_output")
        setup.require_config(self, args)
        setup.require_one_gpu(args)
        limit_threads()
        self._other_processes = OtherProcesses()
        model, tokenizer = setup.prepare_model(model, processing_class, peft_config, args)
        self.audits: dict[str, Any] = {}
        self.data = DataSets(
            model, train_dataset, eval_dataset,
            prepare=lambda rows, name: self._examples(rows, tokenizer, args, name),
        )  # fmt: skip
        self.data.require_best_metric(model, args, self.metric_names)
        use_cache = getattr(transformers_model(model).config, "use_cache", None)
        output_dir = Path(str(args.output_dir))
        with not_left_empty(output_dir):
            with fault_tolerant_callbacks(args) as trackers:
                super().__init__(
                    model=model,
                    args=args,
                    data_collator=PackingCollator("padded", 0),  # type: ignore[arg-type]  # replaced below
                    train_dataset=self.data.train,
                    eval_dataset=self.data.evaluation,
                    processing_class=tokenizer,
                    callbacks=[*trackers, *(callbacks or [])],
                    optimizers=optimizers,
                    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                )
            self.engine = Engine(self.model, args, self.accelerator, self._run_guards)
            self.add_callback(BeforeUpdate(self.engine.before_optimizer_step))
            self.output = OutputWriter(
                self.model, tokenizer, self.data.train, output_dir, use_cache
            )
        self.neftune_noise_alpha = None  # transformers' noise treats a packed row as one example
        # The loss is already divided by the counts of the entire accumulated global batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.checkpoints = Checkpoints(args, self.accelerator)
        self.layout: Layout = "shared" if args.layout == "auto" else args.layout  # type: ignore[assignment]
        self.router: RouterTerm | None = None
        self._proved = False
        if is_replicated(self.model):
            self._prove_layout()
        self.pad_token_id = setup.pad_token_id_of(tokenizer)
        self.data_collator = PackingCollator(self.layout, self.pad_token_id)
        self.metrics = Metrics()
        self.tokens_seen = token_metrics.TokensSeen(self._reduce, args.device)
        self.step_guard = StepGuard(args.allowed_skips)

    def _prove_layout(self) -> None:
        """Choose the layout; for sharded weights this happens after they are wrapped."""
        self.layout = setup.proved_layout(self.model, self.args, self.data.longest)
        self.router = router_term(self.model, self.args, self._reduce)
        if getattr(self.args, "disable_dropout", False):
            disable_noise(self.model, self.no_noise)
        else:
            log_noise(self.model)
        self._proved = True
        compile_layers(self.model, self.accelerator)

    # --- hooks for subclasses ---

    @abstractmethod
    def losses(self, sums: Tensor, batch: PackedBatch) -> StepResult:
        """Return terms and metrics from `outputs` and a batch of `PackingCollator`."""

    def outputs(self, model: nn.Module, inputs: PackedBatch) -> Tensor:
        """Return the inputs of the losses, for each response: `[R]` summed log-probs."""
        logps = token_logprobs(model, inputs.model_inputs)
        return response_sums(logps, inputs.response_index, len(inputs.response_tokens))

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """Return the names of the metrics of an evaluation, without prefix, for `metric_for_best_model`.

        A subclass with additional terms or metrics adds their names.

        Args:
            examples: the evaluation data; None: not known yet.
        """
        kind = cls.token_metrics
        own = set() if kind is None else token_metrics.names(preferences=kind == "preferences")
        return {"loss", *own}

    def data_options(self, args: BaseConfig) -> dict[str, Any]:
        """Return additional arguments of `prepare_dataset`."""
        return {}

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        """Prepare for training, with the model as it was passed; called before the loop starts."""

    def policy_ready(self, resume_from_checkpoint: str | None) -> None:
        """Use the model on its device (wrapped, if it is sharded); called before the loop starts.

        The weights are still the initial ones; a checkpoint is loaded afterwards.
        """

    def before_forward(self, inputs: PackedBatch) -> None:
        """Prepare the forward pass of a micro-batch, in training and evaluation."""

    def evaluated(self, batch: PackedBatch, outputs: StepOutputs) -> None:
        """Process an evaluation micro-batch and its results from `compute_loss`."""

    def before_update(self) -> bool:
        """Check the final gradients before each optimizer step; raise to prevent the step.

        Returns:
            Whether the step is taken; False: it is skipped, and gradients are cleared.
        """
        # With a loss scaler (float16) infinite gradients are normal: it skips the step itself.
        scaled = self.accelerator.scaler is not None
        taken = self.step_guard.check(
            0.0 if scaled else self._grad_norm,
            step=self.state.global_step + 1,
            reduce=self._reduce,
        )
        if not taken:
            self.model.zero_grad(set_to_none=True)  # optimizers skip weights without a gradient
            self.metrics.undo_step(self._tr_loss)
        return taken

    # --- data ---

    def _examples(
        self, dataset: Any, tokenizer: Any, args: BaseConfig, name: str
    ) -> Examples | None:
        if dataset is None or isinstance(dataset, Examples):
            return dataset
        options = {"require_rewards": self.needs_rewards, **self.data_options(args)}
        return tokenized(
            dataset, tokenizer, args, name=name, kind=self.row_kind, audits=self.audits, **options
        )

    def _collator(self, examples: Examples) -> PackingCollator:
        return PackingCollator(self.layout, self.pad_token_id, examples)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return micro-batches of this rank; the sampler shards, so accelerate must not."""
        if self.train_dataset is None:
            raise ValueError("training requires a train_dataset")
        examples = self.train_dataset
        return train_loader(
            examples, self.args, self._collator(examples), self._train_batch_size, log=self._proved
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return micro-batches of this rank, longest first."""
        examples = self._eval_examples(eval_dataset)
        return eval_loader(examples, self.args, self._collator(examples))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return micro-batches for `predict`, which returns metrics and no predictions."""
        return self.get_eval_dataloader(test_dataset)

    def _eval_examples(self, eval_dataset: Any) -> Examples:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self._examples(given, self.processing_class, self.args, "eval")
        if examples is None:
            raise ValueError("evaluation requires an eval_dataset")
        checked = given is examples
        self.data.require_fit(self.model, examples, self.layout, checked=checked)
        return examples

    # --- training ---

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train as `transformers.Trainer` does; `True` resumes from the newest complete checkpoint.

        None: see `args.resume_from_checkpoint`.
        """
        wanted = resume_from_checkpoint
        resume = self.checkpoints.to_resume(
            self.args.resume_from_checkpoint if wanted is None else wanted
        )
        self._make_output_dir()
        self._flops_per_token = setup.flops_per_token(self.model)
        setup.note_defaults(self.args)
        self.output.written.remember()
        self.output.written.align(self.processing_class)
        self.metrics.training = MetricSums()
        self.step_guard.begin(resume)
        self.tokens_seen.begin(resume)
        self.before_training(resume)
        on_cpu = self.args.device.type == "cpu"
        if self.checkpoints.background is not None and is_main():
            warn_of_early_callbacks(self.callback_handler.callbacks)
        with (
            keeping_freed_memory() if on_cpu else contextlib.nullcontext(),
            self.checkpoints.kept_on_errors(),
        ):
            if not self.engine.wraps_late:
                self.policy_ready(resume)
            if on_cpu and is_main():
                self._other_processes.report()
            return super().train(resume_from_checkpoint=resume, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Prepare as transformers does, with hooks between wrapping the model and loading a checkpoint."""
        # Use the current intervals for logging and saving, not those of the checkpoint.
        self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]
        setup.stop_input_gradients(self.model, self.args)
        if not self.engine.wraps_late:
            return super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, resume_from_checkpoint
            )
        model, _ = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        self.engine.guard_optimizer(self.optimizer)
        if not self._proved:  # the loader was balanced by the costs of an assumed layout
            self._prove_layout()
            self.data_collator = self._collator(self.train_dataset)
            train_dataloader = self.get_train_dataloader()
        self.callback_handler.train_dataloader = train_dataloader
        self.policy_ready(resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            reshard(self.model)
            load_into_wrapped(self, resume_from_checkpoint)
        return model, train_dataloader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the number of examples of an optimizer step, over all ranks."""
        if args.by_tokens:
            return int(args.examples_per_step())
        return int(super().get_total_train_batch_size(args))

    # --- the step ---

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch | StepBatch], Tensor | None]:
        """Return the micro-batches of one optimizer step, and the counts of the global batch, `[2]`."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step: transformers would stop one step too late.
            self.control.should_training_stop = True
            return [], None
        if self.step_guard.limit:
            self.metrics.keep(self._tr_loss)
        batches: list[Any] = [
            batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)
        ]
        if not batches:
            return batches, None
        if self.router is not None:
            self.router.begin_step(batches)
        self.tokens_seen.add(batches)
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        return batches, self._reduce(move(counts, device, non_blocking=True))

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch | StepBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; with a token budget, of all micro-batches of the step."""
        if self.router is not None:
            model.train()
            self.router.prepare(lambda batch: self._router_sums(model, batch))
        if not isinstance(inputs, StepBatch):
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]
        batches = inputs.micro_batches
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches, 1):
            with self.engine.accumulating(model, last=number == len(batches)):
                total += super().training_step(model, batch, num_items_in_batch)  # type: ignore[arg-type]
        return total

    def _router_sums(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Return the sums for the load-balancing loss of a micro-batch, from a forward without the head."""
        assert self.router is not None
        inputs = self._prepare_inputs(batch)
        self.before_forward(inputs)
        with self.compute_loss_context_manager():
            return self.router.sums_only(model, inputs)

    def _prepare_inputs(self, inputs: PackedBatch) -> PackedBatch:  # type: ignore[override]
        """Move tensors and keep their dtype: rewards and log-probs stay float32 with DeepSpeed."""
        return inputs.to(self.args.device)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, scaled to sum to the total loss over micro-batches and ranks."""
        self.before_forward(inputs)
        if self.router is not None:
            self.router.request(inputs)
        if self.token_metrics is not None:
            token_metrics.request(inputs, preferences=self.token_metrics == "preferences")
        sums = self.outputs(model, inputs)
        result = self.losses(sums, inputs)
        training = num_items_in_batch is not None
        counts = inputs.counts if num_items_in_batch is None else num_items_in_batch
        metrics = self.metrics.training if training else self.metrics.evaluation
        loss = result.total(inputs, counts, metrics, sums.dtype)
        self.metrics.coefficients = result.coefficients
        token_metrics.add_to(metrics, inputs)
        if self.router is not None:
            loss = self.router.add_to(loss, inputs, metrics if training else None)
            self.metrics.coefficients[ROUTER_AUX] = self.router.coefficient
        if training:
            self.step_guard.add(loss.detach(), inputs.ids)
            loss = loss * self.args.world_size  # the engines average gradients over ranks
        return (loss, StepOutputs(sums.detach(), result.gaps)) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return self._grad_norm

    def _run_guards(self, grad_norm: float | None) -> None:
        if grad_norm is not None:
            self._grad_norm = grad_norm
        self.before_update()

    # --- log lines and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add metrics to a training log line: means over all examples since the last one."""
        if "loss" in logs:
            logs.update(self.metrics.training.drain(self._reduce))
            logs["num_tokens"] = self.tokens_seen.total()
            self.step_guard.correct_log(logs)
        super().log(logs, start_time)

    def _reduce(self, sums: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return sums
        return self.accelerator.reduce(sums, reduction="sum")  # type: ignore[no-any-return]

    def _track_num_input_tokens(self, inputs: PackedBatch | StepBatch) -> None:
        """Add the tokens of a training forward, or of all forwards of a step, over all ranks."""
        wanted = self.args.include_num_input_tokens_seen
        if wanted != "no":
            tokens = inputs.num_tokens(padding=wanted == "all")
            seen = self._reduce(widest(torch.tensor(float(tokens), device=self.args.device)))
            self.state.num_input_tokens_seen += int(seen)

    def floating_point_ops(self, inputs: PackedBatch | StepBatch) -> int:  # type: ignore[override]
        """Return the estimated FLOPs of a training forward and backward pass on this rank."""
        return self._flops_per_token * inputs.num_tokens(padding=True)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as transformers does; with FSDP and DeepSpeed only after training has started."""
        self.engine.require_wrapped()
        return super().evaluate(*args, **kwargs)

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: PackedBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of an evaluation micro-batch; its metrics are added to the sums."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self.evaluated(inputs, outputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as transformers does, but with means over all examples of all ranks as metrics."""
        self.metrics.evaluation.drain()
        output = super().evaluation_loop(*args, **kwargs)
        router = {} if self.router is None else {ROUTER_AUX: self.router.evaluated()}
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self.metrics.of_evaluation(self._reduce, router, prefix)
        return output._replace(metrics={**(output.metrics or {}), **found})

    # --- checkpoints and outputs ---

    def _make_output_dir(self) -> None:
        """Create the output directory, which methods of transformers and callbacks expect."""
        if self.args.should_save:
            Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(super()._get_output_dir(trial))
        with self.checkpoints.staged(output, self.state):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output / f"checkpoint-{self.state.global_step}"))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.checkpoints.finish()  # the best model may be loaded from it
        return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.checkpoints.staging
        return str(staging) if staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete checkpoint: a staged one would be moved during the upload."""
        if self.checkpoints.staging is None:
            with self.output.pushed(self):
                super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers does; sharded weights are gathered and saved in float32."""
        if not self.engine.wraps_late:
            super().save_model(output_dir, _internal_call)
        elif not (
            _internal_call and has_shards(self.model)
        ):  # in a checkpoint the engine saves them
            weights = self.engine.full_weights(self.model, keep=self.args.should_save)
            self._save(output_dir, state_dict=weights)

    def create_model_card(self, *args: Any, dataset_name: Any = None, **kwargs: Any) -> None:
        """Create the model card of `transformers.Trainer`, with TRL's name for `dataset`."""
        if dataset_name is not None:
            kwargs["dataset"] = dataset_name
        self._make_output_dir()
        super().create_model_card(*args, **kwargs)

    def save_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Save metrics as transformers does."""
        self._make_output_dir()
        super().save_metrics(*args, **kwargs)

    def save_state(self) -> None:
        """Save the state as transformers does."""
        self._make_output_dir()
        super().save_state()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self.output.tokenizer_in(self), self.output.written.applied():
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                folder = Path(output_dir or str(self.args.output_dir))
                staged = self.checkpoints.staging is not None
                self.output.complete(self.model, folder, checkpoint=staged)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        background = self.checkpoints.background
        if background is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None and self.lr_scheduler is not None
            background.torch_save(self.optimizer.state_dict(), Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        tokens = self.tokens_seen.total()
        if self.args.should_save:
            self.tokens_seen.write(Path(output_dir), tokens)
            self.engine.write(Path(output_dir))
            self.step_guard.write(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with keep_hyperparameters_on_load(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)
