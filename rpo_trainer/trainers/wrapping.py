"""`transformers.Trainer` under engines that place and shard the model when they wrap it: FSDP2 and DeepSpeed.

What our trainers promise holds there too: the policy is looked at before a checkpoint is loaded into it, the
guards run before a weight moves, and outputs are whole and in float32.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from rpo_trainer.errors import RecipeError
from rpo_trainer.models.sharding import full_state_dict, has_shards, reshard
from rpo_trainer.trainers.engine import (
    DeepSpeedGuard,
    check_engine,
    set_find_unused_parameters,
    settle,
    wrap_present_layers,
    wraps_late,
    write_engine,
)
from rpo_trainer.trainers.guards import BeforeUpdate
from rpo_trainer.trainers.setup import stop_input_gradients
from rpo_trainer.trainers.step_config import BaseConfig


class WrappingTrainer(Trainer):
    """Between `transformers.Trainer` and ours; without such an engine it changes nothing."""

    args: BaseConfig
    model: Any
    _grad_norm: Tensor | float = 0.0

    def apply_engine_overrides(self) -> None:
        """Checks and settles the engine; once, when the trainer is made."""
        check_engine(self.args, self.accelerator)
        settle(self.args, self.accelerator)
        wrap_present_layers(self.model, self.accelerator)
        set_find_unused_parameters(self.model, self.args, self.accelerator)
        self.wraps_late = wraps_late(self.accelerator)
        self._deepspeed_guard: DeepSpeedGuard | None = None
        self.add_callback(BeforeUpdate(self._before_optimizer_step))

    # --- what a subclass says ---

    @abstractmethod
    def before_update(self) -> bool:
        """Runs before each optimizer step, gradients in place; raises to keep the optimizer still.

        Returns:
            Whether the step is taken.
        """

    def wrapped(self, train_dataloader: Any) -> Any:
        """Runs when such an engine has wrapped the model; gives the loader to train with."""
        return train_dataloader

    def policy_ready(self, resume_from_checkpoint: str | None) -> None:
        """Runs before the loop starts, the model on its device and, where it is sharded, wrapped.

        Its weights still are those it was given with; a checkpoint is loaded afterwards.
        """

    # --- wrapping ---

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """transformers', with a pause between wrapping a model and loading its checkpoint."""
        # A checkpoint brings the intervals it was made with; those that are asked for now count.
        self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]
        stop_input_gradients(self.model, self.args)
        if not self.wraps_late:
            return super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, resume_from_checkpoint
            )
        model, _ = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        if self.is_deepspeed_enabled:
            self._deepspeed_guard = DeepSpeedGuard(self.optimizer, self._guard_deepspeed)
        train_dataloader = self.callback_handler.train_dataloader = self.wrapped(train_dataloader)
        self.policy_ready(resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            reshard(self.model)
            self._load_wrapped(resume_from_checkpoint)
        return model, train_dataloader

    def _load_wrapped(self, folder: str) -> None:
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(  # type: ignore[no-untyped-call]
                self.model_wrapped,
                folder,
                load_module_strict=not hasattr(self.model, "peft_config"),
            )
        else:
            self._load_from_checkpoint(folder, self.model_wrapped)
        self._load_optimizer_and_scheduler(folder)
        self._load_scaler(folder)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`transformers.Trainer.evaluate`; FSDP and DeepSpeed can only evaluate what they train."""
        if self.wraps_late and not self.accelerator._models:
            raise RecipeError(
                "evaluate() came before train()",
                why="FSDP and DeepSpeed wrap the model together with its optimizer",
                fix="set eval_on_start=True, or evaluate after training",
            )
        return super().evaluate(*args, **kwargs)

    # --- guards ---

    def _before_optimizer_step(self) -> None:
        if self._deepspeed_guard is None:
            self.before_update()
        else:
            self._deepspeed_guard.after_step()

    def _guard_deepspeed(self, grad_norm: float) -> None:
        self._grad_norm = grad_norm
        self.before_update()

    # --- what is written ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`transformers.Trainer.save_model`; sharded weights are written whole, and in float32."""
        if not self.wraps_late:
            super().save_model(output_dir, _internal_call)
            return
        if _internal_call and has_shards(self.model):
            return  # a checkpoint, in which the engine keeps the weights by itself
        weights = full_state_dict(
            self.model,
            keep=self.args.should_save,
            trained_only=hasattr(self.model, "peft_config"),
        )
        self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_engine(Path(output_dir), self.accelerator)
