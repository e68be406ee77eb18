"""What to write in place of an argument that a config does not take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rpo_trainer.errors import RecipeError, did_you_mean
from rpo_trainer.recipe.foreign_names import FOREIGN_NAMES

# What to write in place of an argument of a config, or of a trainer
ELSEWHERE = {name: row.config for name, row in FOREIGN_NAMES.items() if row.config}
CONSTRUCTOR = {name: row.trainer for name, row in FOREIGN_NAMES.items() if row.trainer}


def answering_unknown_arguments(make: Callable[..., None]) -> Callable[..., None]:
    """A trainer's `__init__` that says what to write in place of an argument that it does not take.

    Raises:
        RecipeError: from the new `__init__`.
    """
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return make  # a subclass that hands its arguments on
    known = [name for name in parameters if name != "self"]

    @functools.wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        unknown = [name for name in given if name not in known]
        if unknown:
            raise RecipeError(
                f"there is no argument {' or '.join(unknown)}",
                code="training.unknown-argument",
                where=type(self).__name__,
                why="the trainer has no use for it",
                fix="; ".join(
                    f"{name}: {CONSTRUCTOR[name]}"
                    if name in CONSTRUCTOR
                    else instead_of(name, known)
                    for name in unknown
                ),
            )
        make(self, *args, **given)

    return init


def instead_of(name: str, known: Sequence[str]) -> str:
    """What to write in place of the argument `name`, which is not one of the `known` ones."""
    if name in ELSEWHERE:
        return f"{name}: {ELSEWHERE[name]}"
    near = did_you_mean(name, known)
    return (
        f"{name}: did you mean {near}?" if near else f"{name}: remove it: there is nothing like it"
    )
