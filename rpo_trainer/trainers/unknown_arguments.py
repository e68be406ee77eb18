"""Arguments of configs and trainers that other libraries have: read under another name, or answered."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rpo_trainer.errors import RecipeError, did_you_mean
from rpo_trainer.recipe.foreign_names import FOREIGN_NAMES

logger = logging.getLogger(__name__)

# What to write instead of an argument of a config, or of a trainer
ELSEWHERE = {name: row.config for name, row in FOREIGN_NAMES.items() if row.config}
CONSTRUCTOR = {name: row.trainer for name, row in FOREIGN_NAMES.items() if row.trainer}
# Other names of the same argument, of older versions of TRL and transformers
RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a fraction of the steps
    "tokenizer": "processing_class",
}


def known_arguments(
    where: str,
    known: Sequence[str],
    given: Mapping[str, Any],
    answers: Mapping[str, str] = ELSEWHERE,
) -> dict[str, Any]:
    """Return the arguments under the names of this package, without foreign ones that are None.

    Args:
        where: the class that they are given to.
        known: names of its parameters.
        answers: what to write instead of an argument that it does not have.

    Raises:
        RecipeError: an argument that it does not have, or one given under two names.
    """
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in given.items():
        own = RENAMED.get(name, name) if name not in known else name
        if own in known and (own == name or own not in given):
            found[own] = value
        elif own in known:
            raise RecipeError(
                f"{name} and {own} are two names of one argument",
                code="training.conflicting-settings",
                details={"settings": [name, own]},
                where=where,
                fix=f"remove {name}",
            )
        elif value is not None or not (name in answers or name in ELSEWHERE):
            unknown.append(name)
    if unknown:
        raise RecipeError(
            f"there is no argument {' or '.join(unknown)}",
            code="training.unknown-argument",
            details={"arguments": unknown},
            where=where,
            fix="; ".join(
                f"{name}: {answers[name]}" if name in answers else instead_of(name, known)
                for name in unknown
            ),
        )
    return found


def with_known_arguments(make: Callable[..., None]) -> Callable[..., None]:
    """Wrap a trainer's `__init__` to answer arguments of other libraries, see `known_arguments`."""
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return make  # a subclass that passes its arguments on
    known = [name for name in parameters if name != "self"]

    @functools.wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        make(self, *args, **known_arguments(type(self).__name__, known, given, CONSTRUCTOR))

    return init


def instead_of(name: str, known: Sequence[str]) -> str:
    """Return what to write instead of the argument `name`, which is not one of `known`."""
    if name in ELSEWHERE:
        return f"{name}: {ELSEWHERE[name]}"
    near = did_you_mean(name, known)
    return f"{name}: did you mean {near}?" if near else f"{name}: remove it"
