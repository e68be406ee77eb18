"""Files of outputs and checkpoints besides the weights; none of them is pickled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import trainer as of_transformers
from transformers.trainer import TRAINING_ARGS_NAME

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
    write_auto_class_files,
)
from rpo_trainer.models.sharding import is_replicated
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime.distributed import is_main, on_main
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.fits import trained_ends

logger = logging.getLogger(__name__)


@contextmanager
def not_left_empty(folder: Path) -> Iterator[None]:
    """Remove a directory that is created inside the context and is empty at its end.

    transformers creates `output_dir` in the constructor of its trainer, before anything is written. Parents
    are kept: another process may be creating a directory in them.
    """
    existed = folder.exists()
    try:
        yield
    finally:
        if is_main() and not existed:  # other ranks may see it later than it is created
            with suppress(OSError):  # not created, or not empty
                folder.rmdir()


class OutputWriter:
    """Prepares configs and tokenizer of the outputs, and checks that they can be saved.

    Args:
        model: the model before an engine wraps it.
        tokenizer: the trainer's tokenizer.
        examples: the training data, for the tokens at the end of responses.
        folder: the trainer's `output_dir`.
        use_cache: `use_cache` of the model's config before transformers' Trainer changed it.

    Attributes:
        written: configs and tokenizer of the outputs.

    Raises:
        ModelError: config, generation config, tokenizer or adapter config cannot be saved, or parameters
            share memory in a way that safetensors does not support.
        RunError: the output directory is not writable.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        examples: Examples | None,
        folder: Path,
        use_cache: Any,
    ) -> None:
        self.folder = folder
        inner = transformers_model(model)
        if use_cache is not None:  # forwards of a step pass use_cache=False
            inner.config.use_cache = use_cache
        generation = getattr(inner, "generation_config", None)
        lines = [] if generation is None else [warn_repaired(repair_generation(generation))]
        ends = [] if is_classifier(inner) else trained_ends(examples, tokenizer)
        self.written = Written(inner, tokenizer, ends)
        lines.append(ends_line(inner, self.written, tokenizer))
        for line in filter(None, lines if is_main() else ()):
            logger.warning("%s", line)
        if generation is not None and ends:
            generation.eos_token_id = joined_ends(ends, generation.eos_token_id)
        # PEFT copies weights that an adapter shares with the base.
        if is_replicated(model) and not is_adapted(model):
            check_unshared(inner)
        on_main(lambda: self._check_savable(model))

    def _check_savable(self, model: nn.Module) -> None:
        inner, tokenizer = transformers_model(model), self.written.tokenizer
        parts = {
            "model's config": inner.config,
            "generation config": getattr(inner, "generation_config", None),
            "tokenizer": tokenizer if hasattr(tokenizer, "save_pretrained") else None,
        }
        for name, config in (getattr(model, "peft_config", None) or {}).items():
            parts[f"config of the adapter {name}"] = config
        with self.written.applied():
            check_savable(parts, self.folder)

    def complete(self, model: nn.Module, folder: Path, *, checkpoint: bool) -> None:
        """Add the files that are needed to load saved weights, and remove transformers' pickle.

        The pickle of the arguments contains absolute paths and is never read.
        """
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        inner = transformers_model(model)
        if not is_adapted(model):
            write_auto_class_files(inner, folder)
            return
        make_base_absolute(folder)
        if checkpoint:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template
        generation = getattr(inner, "generation_config", None)
        if generation is not None and not is_classifier(model):
            generation.save_pretrained(folder)

    @contextmanager
    def tokenizer_in(self, trainer: Any) -> Iterator[None]:
        """Set the tokenizer that is saved as that of the trainer inside this context."""
        given, trainer.processing_class = trainer.processing_class, self.written.tokenizer
        try:
            yield
        finally:
            trainer.processing_class = given

    @contextmanager
    def pushed(self, trainer: Any) -> Iterator[None]:
        """Let transformers push a checkpoint with the output tokenizer and without a pickle.

        Otherwise transformers saves its tokenizer and pickles the arguments to the output directory.
        """
        hidden = f"_{TRAINING_ARGS_NAME}"
        of_transformers.TRAINING_ARGS_NAME = hidden
        try:
            with self.tokenizer_in(trainer):
                yield
        finally:
            of_transformers.TRAINING_ARGS_NAME = TRAINING_ARGS_NAME
            (self.folder / hidden).unlink(missing_ok=True)
