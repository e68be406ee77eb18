"""Checkpoints and outputs as our trainers write them: complete or absent, and nothing pickled beside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from rpo_trainer.distributed import on_main
from rpo_trainer.errors import RunError
from rpo_trainer.trainers import checkpoint
from rpo_trainer.trainers.engine import check_same_engine
from rpo_trainer.trainers.wrapping import WrappingTrainer


@contextmanager
def own_settings(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """A checkpoint that is loaded within brings its state, not its learning rate, betas or weight decay.

    They are in the file, and would silently take the place of those that a run is started with. Of an
    unchanged run they are the same.
    """
    before = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds the real one
    rates = list(getattr(inner, "base_lrs", ()))
    yield
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update(own)
    if rates and hasattr(inner, "lr_lambdas"):
        inner.base_lrs = rates
        factors = [factor(inner.last_epoch) for factor in inner.lr_lambdas]
        inner._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, inner._last_lr, strict=True):
            group["lr"] = rate


class SavingTrainer(WrappingTrainer):
    """Writes a checkpoint beside its place, and moves it there when it is whole."""

    _staging: Path | None = None

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
        # transformers asks the disk, where each rank finds what the others have written by then, or
        # have not; at the end all of them load from it, or wait for those that do.
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            self.state.best_model_checkpoint = str(output / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            checkpoint.commit(staging / name, output / name)
            shutil.rmtree(staging, ignore_errors=True)
            checkpoint.rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint from its place: what is staged moves while it would be read."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with own_settings(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_wrapped(self, folder: str) -> None:
        with own_settings(self.optimizer, self.lr_scheduler):
            super()._load_wrapped(folder)

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that `train(resume_from_checkpoint=wanted)` means; None: it begins.

        Raises:
            RunError: there is none, it is damaged or has no optimizer, or another engine has written it.
        """
        if not wanted:
            return None
        if wanted is True:
            output = Path(str(self.args.output_dir))
            found = on_main(lambda: checkpoint.last_complete(output))
            if found is None:
                raise RunError(
                    "there is no complete checkpoint to resume from",
                    where=self.args.output_dir,
                    why="only one whose files are all as they were written goes on as the run did",
                    fix="leave resume_from_checkpoint out to begin, or name another output_dir",
                )
        else:
            found = folder = Path(str(wanted))
            on_main(lambda: checkpoint.require_complete(folder))
        check_same_engine(found, self.accelerator)
        deepspeed = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        own_scheduler = deepspeed is None or "scheduler" not in deepspeed.deepspeed_config
        on_main(
            lambda: checkpoint.require_state(
                found,
                scaler=self.accelerator.scaler is not None,
                own_scheduler=own_scheduler,
                ranks=self.args.world_size,
            )
        )
        return str(found)
