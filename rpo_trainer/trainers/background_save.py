"""Saving while training continues (`async_save`): tensors are copied to CPU memory, and a thread writes them.

Only weights and optimizer state are left to the thread. The small files of a checkpoint (configs, tokenizer,
RNG states, the trainer's state) are written before training continues.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, modeling_utils

from rpo_trainer.errors import RunError
from rpo_trainer.runtime.files import refusal

logger = logging.getLogger(__name__)

_WRITER = "safe_save_file"  # by which transformers and PEFT write safetensors


class BackgroundSave:
    """Writes one checkpoint at a time in a thread."""

    def __init__(self) -> None:
        self._writes: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Copy weights that are saved inside this context; `start` writes them."""
        from peft import peft_model

        modules = (modeling_utils, peft_model)
        own = [getattr(module, _WRITER) for module in modules]

        def defer(write: Callable[..., None]) -> Callable[..., None]:
            def writer(tensors: Any, path: Any, metadata: Any = None) -> None:
                held = in_cpu_memory(tensors)
                self._writes.append(lambda: write(held, path, metadata=metadata))

            return writer

        try:
            for module, write in zip(modules, own, strict=True):
                setattr(module, _WRITER, defer(write))
            yield
        except BaseException:
            self._writes = []
            raise
        finally:
            for module, write in zip(modules, own, strict=True):
                setattr(module, _WRITER, write)

    def torch_save(self, content: Any, path: Path) -> None:
        """Copy what `torch.save` will write to `path`."""
        held = in_cpu_memory(content)
        self._writes.append(lambda: torch.save(held, path))

    def start(self, folder: Path, commit: Callable[[], None]) -> None:
        """Write what was deferred in a thread, and then call `commit`.

        Args:
            folder: the checkpoint, for messages.
            commit: makes the checkpoint complete.
        """
        writes, self._writes = self._writes, []
        self._abandoned.clear()

        def run() -> None:
            try:
                while writes:
                    if self._abandoned.is_set():
                        return
                    writes.pop(0)()  # its copy is freed
                commit()
            except BaseException as error:  # raised by `finish`
                self._error = error
                logger.warning(
                    "%s was not written (%s): training stops at the next checkpoint or at its end",
                    folder, error,
                )  # fmt: skip

        self._thread = threading.Thread(target=run, name=f"saving {folder.name}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            RunError: the file system has refused to write it.
        """
        self._join()
        error, self._error = self._error, None
        if error is None:
            return
        if (message := refusal(error)) is None:
            raise error
        raise RunError(
            f"file system error: {message}",
            code="run.file-system",
            where=str(getattr(error, "filename", None) or "a checkpoint"),
            why="the checkpoint was not written; earlier complete checkpoints are kept",
            fix="free disk space or fix the permissions, then run the same command to resume",
        ) from error

    def stop(self, *, abandon: bool) -> None:
        """Wait for the thread after another error; its own error has been logged.

        Args:
            abandon: end it after the file that it is writing; there will be no checkpoint.
        """
        if abandon:
            self._abandoned.set()
        self._join()
        self._error = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def in_cpu_memory(content: Any) -> Any:
    """Return a copy of nested containers with all tensors in CPU memory."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    # deepcopy keeps shared objects shared, so that the same bytes are written.
    copies = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in tensors}
    return copy.deepcopy(content, dict(copies))


def warn_of_early_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    """Log a WARNING for callbacks with `on_save`, which is called before the checkpoint is on disk."""
    names = [
        type(callback).__name__
        for callback in callbacks
        if type(callback).on_save is not TrainerCallback.on_save
    ]
    if names:
        logger.warning(
            "async_save: `on_save` of %s is called before the checkpoint is on disk",
            ", ".join(names),
        )
