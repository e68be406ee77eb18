"""Collections of garbage that look through what a stage has made, and not all the libraries again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def light_collections() -> Iterator[None]:
    """What is there already is left out of Python's collections inside.

    transformers, accelerate and the chain collect several times a stage, and each time a million objects
    of the libraries would be looked through: a tenth of the time where stages are short. Nothing is
    done where the process that calls has frozen its objects itself.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is frozen is not freed before the end
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
