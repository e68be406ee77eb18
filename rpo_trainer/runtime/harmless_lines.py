"""Hides log lines of other libraries that are known to be harmless, by logger and text."""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

# Logger name → how the line begins, with the reason.
HARMLESS: dict[str, tuple[str, ...]] = {
    # At import on a machine without a GPU.
    "DeepSpeed": ("Setting accelerator to CPU. If you have GPU",),
}
# Module that warns → how the text begins (a regular expression), and its category.
HARMLESS_WARNINGS: dict[str, tuple[str, type[Warning]]] = {
    # PEFT reads the old name of a property of transformers, which still works.
    "transformers.modeling_utils": ("`is_gradient_checkpointing` is deprecated", FutureWarning),
}
_MISSING = re.compile(r"There were missing keys in the checkpoint model loaded: (\[.*\])\.")


class _Hide(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def hide_harmless_lines() -> None:
    """Hide these lines and warnings; for programs, not for libraries."""
    for name, beginnings in HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hide) for known in logger.filters):
            logger.addFilter(_Hide(beginnings))
    for module, (beginning, category) in HARMLESS_WARNINGS.items():
        warnings.filterwarnings("ignore", beginning, category, module)


@contextmanager
def tied_keys_hidden(tied: Collection[str]) -> Iterator[None]:
    """Hide the Trainer's warning about keys missing from a checkpoint, if all of them are tied weights.

    A checkpoint holds each tied weight once, under one of its names.
    """

    def shown(record: logging.LogRecord) -> bool:
        found = _MISSING.match(record.getMessage())
        return found is None or not set(ast.literal_eval(found[1])) <= set(tied)

    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)
