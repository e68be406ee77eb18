"""Overrides from the command line: `stages.dpo.beta=0.005` or `--stages.dpo.beta 0.005`.

A key is the path to a value: field names, names or indices of stages, and indices of list elements,
joined by dots. An index one past the end appends; a YAML list replaces the entire list. Values are
YAML 1.2. Keys and values are validated by the schema, so that an override has the same error messages
as the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpo_trainer.errors import RecipeError, suggestion
from rpo_trainer.recipe.environment import is_secret
from rpo_trainer.recipe.rules.chain import expanded_names
from rpo_trainer.recipe.schema.stages import LENGTH_FIELDS
from rpo_trainer.recipe.yaml_document import Key, YamlProblem, parse

_WHY = "each argument after the recipe overrides one value"
_WHY_PATH = "a key is the path to a value of the recipe"


@dataclass(frozen=True)
class Override:
    """One override: the dotted key, the parsed value, and how to name it in an error."""

    key: str
    value: Any
    where: str


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[RecipeError]]:
    """Parse command-line words; return the overrides, and the errors of words that are not valid."""
    overrides: list[Override] = []
    errors: list[RecipeError] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        try:
            overrides.append(_override(key.strip(), bool(equals), text.strip(), word))
        except RecipeError as error:
            errors.append(error)
    return overrides, errors


def _override(key: str, has_value: bool, text: str, word: str) -> Override:
    example = "write `key=value` or `--key value`, for example `stages.dpo.beta=0.005`"
    where = f"override {f'{key}=...' if is_secret(key.rpartition('.')[2], text) else word}"
    if not key or any(not part for part in key.split(".")):
        raise RecipeError(
            f"`{key}` is not a valid key",
            code="option.invalid-key",
            where=where,
            why=_WHY,
            fix=example,
        )
    if not has_value and not word.startswith("--"):
        raise RecipeError(
            "`=` is missing", code="option.missing-value", where=where, why=_WHY, fix=example
        )
    if not text:
        what, fix = "the value is missing", f"{example}; `null` removes a value"
        if not has_value and "." not in key:
            what = "not an option, and not an override, which needs a value"
            fix = f"see --help for the options, or {example}"
        raise RecipeError(what, code="option.missing-value", where=where, why=_WHY, fix=fix)
    try:
        value = parse(text).data
    except YamlProblem as problem:
        raise RecipeError(
            f"the value is {problem.what}" if problem.what.startswith("not") else problem.what,
            code="option.invalid-yaml",
            where=where,
            why="values of overrides are YAML, as in the file",
            fix="put quotes around text with special characters: key='\"...\"'",
        ) from problem
    shown = "..." if is_secret(key.rpartition(".")[2], value) else text
    return Override(key, value, f"override {key}={shown}")


def apply_override(data: dict[str, Any], override: Override) -> Key:
    """Set the value in the raw recipe and return its key.

    Raises:
        RecipeError: the key is not valid (no such stage, no such list element, a field of a number).
    """
    parts = _split(data, override)
    here: Any = data
    walked: list[str | int] = []
    for depth, following in enumerate(parts[1:]):
        index = _index(here, parts, depth, override)
        child = _child(here, index)
        if child is None:
            child = _inherited(data, walked, index)
        if child is None:
            child = [] if following == "0" else {}
        _store(here, index, child)
        here = child
        walked.append(index)
    index = _index(here, parts, len(parts) - 1, override)
    _store(here, index, copy.deepcopy(override.value))
    return (*walked, index)


def drop_other_length(data: Mapping[str, Any], key: Key, overridden: set[Key]) -> None:
    """Let `max_steps` on the command line replace `num_train_epochs` of the file, and vice versa.

    Overrides of both are kept: validation reports the conflict.
    """
    if key[-1] not in LENGTH_FIELDS or len(key) < 2:
        return
    holder: Any = data
    for part in key[:-1]:
        holder = holder[part]
    if holder[key[-1]] is None:
        return
    for other in LENGTH_FIELDS:
        if other != key[-1] and (*key[:-1], other) not in overridden:
            holder.pop(other, None)


def _split(data: Mapping[str, Any], override: Override) -> list[str]:
    """Split a dotted key; names of stages may contain dots."""
    parts = override.key.split(".")
    stages = data.get("stages")
    if parts[0] != "stages" or len(parts) < 2 or not isinstance(stages, list):
        return parts
    rest = override.key.partition(".")[2]
    names = [str(stage["name"]) for stage in stages if isinstance(stage, dict) and "name" in stage]
    for name in sorted(names, key=len, reverse=True):
        if rest == name or rest.startswith(f"{name}."):
            tail = rest[len(name) + 1 :]
            return ["stages", name, *(tail.split(".") if tail else [])]
    return parts


def _index(here: Any, parts: Sequence[str], depth: int, override: Override) -> str | int:
    """Return the key or index that `parts[depth]` denotes in `here`."""
    part, place = parts[depth], ".".join(parts[:depth])
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise RecipeError(
            f"`{place}` is not a mapping and has no `{part}`",
            code="option.invalid-key",
            where=override.where,
            why=_WHY_PATH,
            fix=f"override the value itself: `{place}=...`",
        )
    if place == "stages":
        return _stage_index(here, part, override)
    if part.isdecimal() and int(part) <= len(here):
        return int(part)
    present = "0" if len(here) == 1 else f"0 to {len(here) - 1}" if here else ""
    raise RecipeError(
        f"`{place}` is a list of {len(here)} and has no element `{part}`",
        code="option.invalid-key",
        where=override.where,
        why=_WHY_PATH,
        fix=f"use {present + ', or ' if present else ''}{len(here)} to append",
    )


def _stage_index(stages: Sequence[Any], part: str, override: Override) -> int:
    mappings = [(i, s) for i, s in enumerate(stages) if isinstance(s, dict)]
    for index, stage in mappings:
        if stage.get("name") == part:
            return index
    if part.isdecimal() and int(part) < len(stages):
        return int(part)
    names = [str(stage["name"]) for _, stage in mappings if "name" in stage]
    for _, stage in mappings:
        if isinstance(stage.get("name"), str) and part in expanded_names(stage):
            raise RecipeError(
                f"`{part}` is a round of the repeated stage `{stage['name']}`",
                code="option.unknown-stage",
                where=override.where,
                why="all rounds have the same fields",
                fix=f"override `{stage['name']}`, or write the rounds as separate stages",
            )
    known = ", ".join(f"`{name}`" for name in names)
    raise RecipeError(
        f"there is no stage `{part}`{suggestion(part, names)}",
        code="option.unknown-stage",
        where=override.where,
        why="an override changes an existing stage",
        fix=f"use {'one of ' * (len(names) > 1)}{known}"
        + f", or an index from 0 to {len(stages) - 1}" * (len(stages) > 1),
    )


def _child(here: Any, index: str | int) -> Any:
    if isinstance(here, dict):
        return here.get(str(index))
    return here[index] if isinstance(index, int) and index < len(here) else None


def _inherited(data: Mapping[str, Any], walked: Sequence[str | int], index: str | int) -> Any:
    """Return a copy of a field that a stage takes from `defaults`, for the override to change."""
    defaults = data.get("defaults")
    if len(walked) != 2 or walked[0] != "stages" or not isinstance(defaults, dict):
        return None
    return copy.deepcopy(defaults.get(str(index)))


def _store(here: Any, index: str | int, value: Any) -> None:
    if isinstance(here, list) and index == len(here):
        here.append(value)
    else:
        here[index] = value
