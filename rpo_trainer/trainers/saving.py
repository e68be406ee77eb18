"""Checkpoints and outputs as our trainers write them: complete or absent, and nothing pickled beside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from rpo_trainer.adapter_files import make_base_absolute
from rpo_trainer.adapters import is_adapted
from rpo_trainer.distributed import on_main
from rpo_trainer.errors import RunError
from rpo_trainer.outputs import (
    Written,
    check_savable,
    check_unshared,
    ends_line,
    joined_ends,
    repair_generation,
    warn_repaired,
)
from rpo_trainer.sharding import whole_on_every_rank
from rpo_trainer.step import causal_lm, is_classifier
from rpo_trainer.trainers import checkpoint
from rpo_trainer.trainers.engine import check_same_engine
from rpo_trainer.trainers.fits import trained_ends
from rpo_trainer.trainers.wrapping import WrappingTrainer

logger = logging.getLogger(__name__)


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

    written: Written
    processing_class: Any
    train_dataset: Any
    _staging: Path | None = None

    def prepare_output(self, use_cache: Any) -> None:
        """Decides what outputs are written with, and tests that it can be written.

        Args:
            use_cache: of the model's config before transformers' Trainer changed it.

        Raises:
            ModelError: the config, the generation config, the tokenizer or the adapter's config cannot be
                saved, or parameters share memory in a way that safetensors cannot hold.
            RunError: the output directory cannot be written to.
        """
        inner = causal_lm(self.model)
        if use_cache is not None:  # every forward of a step says use_cache=False itself
            inner.config.use_cache = use_cache
        generation = getattr(inner, "generation_config", None)
        if generation is not None and (line := warn_repaired(repair_generation(generation))):
            logger.warning("%s", line)
        ends = (
            [] if is_classifier(inner) else trained_ends(self.train_dataset, self.processing_class)
        )
        self.written = Written(inner, self.processing_class, ends)
        if line := ends_line(inner, self.written, self.processing_class):
            logger.warning("%s", line)
        if generation is not None and ends:
            generation.eos_token_id = joined_ends(ends, generation.eos_token_id)
        # PEFT copies what an adapter shares with the base; its parameters have other names.
        if whole_on_every_rank(self.model) and not is_adapted(self.model):
            check_unshared(inner)
        on_main(self._check_savable)

    def _check_savable(self) -> None:
        inner, tokenizer = causal_lm(self.model), self.written.tokenizer
        parts = {
            "model's config": inner.config,
            "generation config": getattr(inner, "generation_config", None),
            "tokenizer": tokenizer if hasattr(tokenizer, "save_pretrained") else None,
        }
        for name, config in (getattr(self.model, "peft_config", None) or {}).items():
            parts[f"config of the adapter {name}"] = config
        folder = Path(str(self.args.output_dir))
        with self.written.applied():
            check_savable(parts, folder)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Without transformers' pickle of the arguments: it names absolute paths, and nobody reads it.

        The configs and the tokenizer are those of `Written`.
        """
        given, self.processing_class = self.processing_class, self.written.tokenizer
        try:
            with self.written.applied():
                super()._save(output_dir, state_dict)
                if self.args.should_save:
                    self._save_beside(Path(output_dir or str(self.args.output_dir)))
        finally:
            self.processing_class = given

    def _save_beside(self, folder: Path) -> None:
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if not is_adapted(self.model):
            return
        make_base_absolute(folder)
        if self._staging is not None:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card
        generation = getattr(causal_lm(self.model), "generation_config", None)
        if generation is not None and not is_classifier(self.model):
            generation.save_pretrained(folder)

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
        checkpoint.refuse_pickles(found)
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
