"""Checkpoints and outputs as our trainers write them: complete or absent, and nothing pickled beside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import trainer as of_transformers
from transformers.trainer import TRAINING_ARGS_NAME

from rpo_trainer.errors import RunError
from rpo_trainer.models.adapter_files import make_base_absolute
from rpo_trainer.models.adapter_methods import is_adapted
from rpo_trainer.models.saved_files import (
    Written,
    check_savable,
    check_unshared,
    ends_line,
    joined_ends,
    repair_generation,
    warn_repaired,
    write_beside,
)
from rpo_trainer.models.sharding import whole_on_every_rank
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime.distributed import is_main, on_main
from rpo_trainer.trainers import checkpoint
from rpo_trainer.trainers.engine import check_same_engine
from rpo_trainer.trainers.fits import trained_ends
from rpo_trainer.trainers.wrapping import WrappingTrainer

logger = logging.getLogger(__name__)


@contextmanager
def keep_hyperparameters_on_load(optimizer: Any, scheduler: Any) -> Iterator[None]:
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


@contextmanager
def _pickle_not_uploaded(folder: Path) -> Iterator[None]:
    """The pickle of the arguments has a name that transformers' pushes leave out (`_*`), and is removed."""
    hidden = f"_{TRAINING_ARGS_NAME}"
    of_transformers.TRAINING_ARGS_NAME = hidden
    try:
        yield
    finally:
        of_transformers.TRAINING_ARGS_NAME = TRAINING_ARGS_NAME
        (folder / hidden).unlink(missing_ok=True)


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
        inner = transformers_model(self.model)
        if use_cache is not None:  # every forward of a step says use_cache=False itself
            inner.config.use_cache = use_cache
        generation = getattr(inner, "generation_config", None)
        lines = [] if generation is None else [warn_repaired(repair_generation(generation))]
        ends = (
            [] if is_classifier(inner) else trained_ends(self.train_dataset, self.processing_class)
        )
        self.written = Written(inner, self.processing_class, ends)
        lines.append(ends_line(inner, self.written, self.processing_class))
        for line in filter(None, lines if is_main() else ()):
            logger.warning("%s", line)
        if generation is not None and ends:
            generation.eos_token_id = joined_ends(ends, generation.eos_token_id)
        # PEFT copies what an adapter shares with the base; its parameters have other names.
        if whole_on_every_rank(self.model) and not is_adapted(self.model):
            check_unshared(inner)
        on_main(self._check_savable)

    def _check_savable(self) -> None:
        inner, tokenizer = transformers_model(self.model), self.written.tokenizer
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
        """Without transformers' pickle of the arguments: it names absolute paths, and nothing reads it.

        The configs and the tokenizer are those of `Written`.
        """
        with self._written_tokenizer(), self.written.applied():
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                self._save_beside(Path(output_dir or str(self.args.output_dir)))

    @contextmanager
    def _written_tokenizer(self) -> Iterator[None]:
        given, self.processing_class = self.processing_class, self.written.tokenizer
        try:
            yield
        finally:
            self.processing_class = given

    def _save_beside(self, folder: Path) -> None:
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if not is_adapted(self.model):
            write_beside(transformers_model(self.model), folder)
            return
        make_base_absolute(folder)
        if self._staging is not None:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card
        generation = getattr(transformers_model(self.model), "generation_config", None)
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
        """Pushes a complete checkpoint: a staged one moves while it would be read.

        transformers saves the tokenizer and pickles the arguments anew, into the output directory. The
        tokenizer is that of `Written`, as in the checkpoint, and the pickle is not uploaded.
        """
        if self._staging is not None:
            return
        with self._written_tokenizer(), _pickle_not_uploaded(Path(str(self.args.output_dir))):
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with keep_hyperparameters_on_load(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_wrapped(self, folder: str) -> None:
        with keep_hyperparameters_on_load(self.optimizer, self.lr_scheduler):
            super()._load_wrapped(folder)

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that `train(resume_from_checkpoint=wanted)` means; None: it begins.

        Args:
            wanted: a directory, or whether to resume from the newest complete checkpoint; as text, too, as a
                command line has it.

        Raises:
            RunError: there is none, it is damaged or has no optimizer, or another engine has written it.
        """
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
            wanted = wanted.lower() == "true"
        if not wanted:
            return None
        if wanted is True:
            output = Path(str(self.args.output_dir))
            found = on_main(lambda: checkpoint.last_complete(output))
            if found is None:
                raise RunError(
                    "there is no complete checkpoint to resume from",
                    where=self.args.output_dir,
                    why="checkpoints that lack files or have changed ones are not used",
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
