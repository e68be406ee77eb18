"""Pydantic's errors as `RecipeError`s: where, what, how to fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from rpo_trainer.errors import RecipeError, did_you_mean, suggestion
from rpo_trainer.losses import find_loss
from rpo_trainer.recipe.foreign_names import FOREIGN_LOSSES, FOREIGN_NAMES, field_of
from rpo_trainer.recipe.rules.forms import CUSTOM, NOT_CONVERTED, short
from rpo_trainer.recipe.schema import NOT_DEFAULTS, STAGE_KINDS
from rpo_trainer.recipe.where import Origins, fields_at, places
from rpo_trainer.recipe.yaml_document import Key, plain_scalar

Located = tuple[int, RecipeError]  # sort key, error

EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
    "list_type": "a list (lines that start with `- `)",
}
BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
# Reasons that add something to the message, by pydantic's error type
_WHY = {
    "union_tag_invalid": "the kind determines the loss and the fields of a stage",
    "union_tag_not_found": "the kind determines the loss and the fields of a stage",
    "string_pattern_mismatch": "the name is a directory in the run directory",
}
_NOT_CONVERTED = re.compile(r".*_(type|from_float)")  # error types of values that are not converted


class Words(NamedTuple):
    """The texts of an error, without its place."""

    what: str
    fix: str
    code: str
    why: str | None = None  # None: that of `why_of`


def why_of(kind: str) -> str | None:
    """Return the reason of an error by pydantic's type; None if the message says it all."""
    return _WHY.get(kind, NOT_CONVERTED if _NOT_CONVERTED.fullmatch(kind) else None)


def recipe_errors(error: ValidationError, origins: Origins) -> list[Located]:
    """Return each error of a validation once, with its place."""
    found: dict[tuple[str, str], Located] = {}
    items = [(_without_kind(item["loc"]), item) for item in error.errors(include_url=False)]
    unknown = [key for key, item in items if item["type"] == "extra_forbidden"]
    excused = {meant for key in unknown for meant in _meant_keys(key, origins)}
    for key, item in items:
        inherited = ("defaults", key[2]) if len(key) == 3 else key
        absent = item["type"] in ("missing", CUSTOM) and origins.value(key) is None
        if absent and (key in excused or inherited in excused):
            continue
        place, where = origins.find(key)
        words = _words(dict(item), key, origins)
        why = words.why or why_of(item["type"])
        problem = RecipeError(words.what, code=words.code, where=where, why=why, fix=words.fix)
        found.setdefault((where, words.what), (place, problem))
    return list(found.values())


def _meant_keys(key: Key, origins: Origins) -> Iterator[Key]:
    """Yield the keys that an unknown key may stand for: they are not reported as missing."""
    known = fields_at(key[:-1], origins.data)
    word = str(key[-1])
    meant = field_of(word)
    if meant not in known:
        near = did_you_mean(word, list(known))
        if near is None:
            return
        meant = near
    yield (*key[:-1], meant)
    if key[:-1] == () and meant == "defaults":
        below = origins.value(key)
        yield from (("defaults", name) for name in (below if isinstance(below, dict) else ()))


def _without_kind(loc: Key) -> Key:
    """Remove the kind of a stage, which pydantic adds after its index."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGE_KINDS:
        return (*loc[:2], *loc[3:])
    return loc


def _words(item: Mapping[str, Any], key: Key, origins: Origins) -> Words:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    name = _name(key)
    about = fields_at(key[:-1], origins.data).get(str(key[-1]) if key else "", "")
    if kind == CUSTOM:
        subject = f"`{name}` " if context["what"].startswith("must ") else ""
        what = f"{subject}{context['what']}"
        return Words(what, context["fix"], code=context["code"], why=context["why"])
    if kind == "missing":
        what = f"`{name}` is missing in {origins.level(key[:-1])}"
        return Words(what, f"add `{name}: ...`{_of(about)}", code="recipe.missing-field")
    if kind == "extra_forbidden":
        return _unknown_key(key, origins)
    if kind in EXPECTED:
        what = f"`{name}` must be {EXPECTED[kind]}, got {described(value)}"
        if isinstance(value, str) and "path" in fields_at(key, origins.data):
            source = f"[{{path: {value}}}]" if kind == "list_type" else f"path: {value}"
            return Words(what, f"write `{source}`", code="recipe.wrong-type")
        return Words(what, _retype(EXPECTED[kind], value, about), code="recipe.wrong-type")
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        limit = f"{words} {short(context[bound])}"
        fix = f"write a number {limit}{_of(about)}"
        return Words(f"`{name}` must be {limit}, got {value}", fix, code="recipe.out-of-range")
    if kind == "finite_number":
        what = f"`{name}` must be a finite number, got {value}"
        return Words(what, f"write a finite number{_of(about)}", code="recipe.not-finite")
    if kind == "literal_error":
        return not_a_choice(name, value, context["expected"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _kind_of_stage(value, origins.level(key))
    if kind in ("too_short", "string_too_short"):
        fix = f"write {'at least one element' if kind == 'too_short' else 'a value'}{_of(about)}"
        return Words(f"`{name}` is empty", fix, code="recipe.empty-field")
    if kind == "string_pattern_mismatch":
        what = f"`{name}` must start with a letter or digit, followed by letters, digits, `.`, `_` or `-`"
        what = f"{what}; got {described(value)}"
        return Words(what, "choose another name, for example `dpo-1`", code="recipe.invalid-name")
    what, fix = f"`{name}`: {item['msg']}", f"write another value{_of(about)}"
    return Words(what, fix, code="recipe.invalid-value")


def _name(key: Key) -> str:
    """Return the last part of a key, with the name of the list if it is an index."""
    for end in range(len(key), 0, -1):
        if isinstance(key[end - 1], str):
            return ".".join(str(part) for part in key[end - 1 :])
    return "the recipe"


def described(value: object) -> str:
    """Describe a value, for `got ...`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "a mapping"


def _of(about: str) -> str:
    """Return the description of a field in parentheses."""
    return f" ({about})" if about else ""


def _retype(expected: str, value: object, about: str) -> str:
    """Return the fix for a value of a wrong type."""
    hint = f"write {expected}{_of(about)}"
    if value is None:
        return f"{hint}, or remove the line"
    if isinstance(value, str):
        plain = plain_scalar(value.replace("_", ""))
        if "number" in expected and isinstance(plain, (int, float)) and not isinstance(plain, bool):
            return "remove the quotes" if "_" not in value else f"write {plain}"
        if expected == "true or false":
            yes = value.lower() in ("yes", "on", "y", "true")
            no = value.lower() in ("no", "off", "n", "false")
            return f"write {'true' if yes else 'false'}, without quotes" if yes or no else hint
    if expected == "text" and isinstance(value, (bool, int, float)):
        return "put quotes around it"
    if expected == "a whole number" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if expected.startswith("a list") and isinstance(value, (str, dict)):
        return "write it as a list of one: put `- ` before it"
    return hint


def not_a_choice(name: str, value: object, expected: str) -> Words:
    """Return the error of a value that is not one of the choices."""
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(",")]
    listed = ", ".join(f"`{choice}`" for choice in choices)
    near = did_you_mean(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean `{near}`?" if near else ""
    what = f"`{name}` must be one of {listed}, got {described(value)}{hint}"
    fix = f"write {f'`{near}`' if near else f'one of {listed}'}"
    if name == "loss_type" and FOREIGN_LOSSES.get(str(value)) in choices:
        fix = f"write `{FOREIGN_LOSSES[str(value)]}`, the name of this loss here"
    elif name == "loss_type" and (loss := find_loss(value)) is not None:
        fix = f"use it in a stage of kind {loss.kind}"
    return Words(what, fix, code="recipe.invalid-choice")


def _kind_of_stage(stage: object, level: str) -> Words:
    kinds = ", ".join(f"`{kind}`" for kind in STAGE_KINDS)
    kind = stage.get("kind") if isinstance(stage, dict) else None
    if kind is None:
        what, fix = f"`kind` is missing in {level}", f"add `kind: ...`, one of {kinds}"
        return Words(what, fix, code="recipe.missing-field")
    what = f"{level} has the unknown kind `{kind}`{suggestion(str(kind), STAGE_KINDS)}"
    return Words(what, f"write one of {kinds}", code="recipe.invalid-choice")


def _unknown_key(key: Key, origins: Origins) -> Words:
    name, level = str(key[-1]), origins.level(key[:-1])
    known, ours = fields_at(key[:-1], origins.data), field_of(name)
    elsewhere = places().get(ours, [])
    instead = FOREIGN_NAMES[name].recipe if name in FOREIGN_NAMES else ""
    if ours not in known and not instead:
        if key[0] == "defaults" and ours in NOT_DEFAULTS:
            what, fix = f"`{name}` cannot be a default", "write it in each stage"
            return Words(what, fix, code="recipe.misplaced-key")
        if elsewhere:
            renamed = f", as `{ours}`" if ours != name else ""
            at = "in" if key[:-1] else "at the top level of"
            what = f"`{name}` does not belong {at} {level}"
            fix = f"move it to {_listed(elsewhere[:3])}{renamed}"
            override = origins.overrides.get(key, "").removeprefix("override ")
            if (
                override
                and not key[:-1]
                and all(place.startswith("a stage") for place in elsewhere)
            ):
                fix = f"write `stages.NAME.{override}`, with the name of {_listed(elsewhere)}{renamed}"
            return Words(what, fix, code="recipe.misplaced-key")
    if not key[:-1] and name in origins.stage_names():
        what = f"unknown field `{name}` in the recipe; `{name}` is a stage"
        override = origins.overrides.get(key, "").removeprefix("override ")
        fix = f"write `stages.{override}`" if override else "move it to the list `stages`"
        return Words(what, fix, code="recipe.unknown-key")
    near, fix = (None, instead) if instead else _instead(name, ours, known, key)
    hint = f"; did you mean `{near}`?" if near else ""
    return Words(f"unknown field `{name}` in {level}{hint}", fix, code="recipe.unknown-key")


def _instead(name: str, ours: str, known: Mapping[str, str], key: Key) -> tuple[str | None, str]:
    """Return the nearest known key, if any, and the fix."""
    near = ours if ours in known else did_you_mean(name, list(known))
    if near:
        return near, f"write `{near}`: {known[near]}"
    if (key[0], len(key)) in (("stages", 3), ("defaults", 2)):
        return None, "put fields of `transformers.TrainingArguments` under `training_args`"
    far = did_you_mean(name, list(places())) if len(name) > 3 else None
    if far:
        return far, f"write `{far}` in {_listed(places()[far][:3])}"
    return None, f"use one of {_listed([f'`{field}`' for field in known])}"


def _listed(words: Iterable[str]) -> str:
    *first, end = words
    return f"{', '.join(first)} or {end}" if first else end
