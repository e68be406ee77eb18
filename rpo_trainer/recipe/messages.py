"""Pydantic's errors in plain words: where, what, how to fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from rpo_trainer.errors import RecipeError, did_you_mean
from rpo_trainer.losses import find_loss
from rpo_trainer.recipe.checks import CHECK, NOT_CONVERTED
from rpo_trainer.recipe.schema import NOT_DEFAULTS, STAGE_KINDS
from rpo_trainer.recipe.where import Origins, fields_at, places
from rpo_trainer.recipe.yaml_document import Key, plain_scalar

Located = tuple[int, RecipeError]  # a number to sort by, the error

EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
    "list_type": "a list (lines that begin with `- `)",
}
BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
# Why each of these is an error, and nothing is guessed, by what pydantic calls it
_WHY = {
    "missing": "no value is right for every run",
    "extra_forbidden": "nothing reads it there: it would be ignored in silence",
    "finite_number": "all that is computed with it would be NaN or infinite",
    "literal_error": "each choice is another computation, and none is guessed",
    "union_tag_invalid": "the kind decides what is trained, and which fields there are",
    "union_tag_not_found": "the kind decides what is trained, and which fields there are",
    "too_short": "without any there is nothing to do",
    "string_too_short": "an empty text names nothing",
    "string_pattern_mismatch": "it is the name of a directory in the run directory",
}
_WHY |= dict.fromkeys(
    BOUNDS, "outside of its range it means nothing, or fails in the middle of a run"
)
# What other tools call our fields
SYNONYMS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gt_reward_scale": "reward_scale",
    "eta": "reward_scale",
    "ref_policy_kl_penalty": "beta",
    "loss": "loss_type",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "output_dir": "run_dir",
    "model_name_or_path": "name_or_path",
    "ref_model": "reference",
    "lora": "peft",
    "peft_config": "peft",
    "max_seq_length": "max_length",
}


def why_of(kind: str) -> str:
    """Why what pydantic calls `kind` is an error."""
    return _WHY.get(kind, NOT_CONVERTED)


def recipe_errors(error: ValidationError, origins: Origins) -> list[Located]:
    """Each error of a validation, once, with its place."""
    found: dict[tuple[str, str], Located] = {}
    items = [(_without_kind(item["loc"]), item) for item in error.errors(include_url=False)]
    unknown = [key for key, item in items if item["type"] == "extra_forbidden"]
    excused = {meant for key in unknown for meant in _meant_keys(key, origins)}
    for key, item in items:
        inherited = ("defaults", key[2]) if len(key) == 3 else key
        absent = item["type"] in ("missing", CHECK) and origins.value(key) is None
        if absent and (key in excused or inherited in excused):
            continue
        place, where = origins.find(key)
        what, fix, why = _words(dict(item), key, origins)
        problem = RecipeError(what, where=where, why=why or why_of(item["type"]), fix=fix)
        found.setdefault((where, what), (place, problem))
    return list(found.values())


def _meant_keys(key: Key, origins: Origins) -> Iterator[Key]:
    """What an unknown key is a misspelling of: that it is missing is not a second mistake."""
    known = fields_at(key[:-1], origins.data)
    word = str(key[-1])
    meant = SYNONYMS.get(word, word)
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
    """Pydantic puts the kind of a stage behind its index."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGE_KINDS:
        return (*loc[:2], *loc[3:])
    return loc


def _words(item: Mapping[str, Any], key: Key, origins: Origins) -> tuple[str, str, str | None]:
    """What, fix and why of one error."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    name = _name(key)
    about = fields_at(key[:-1], origins.data).get(str(key[-1]) if key else "", "")
    if kind == CHECK:
        what = (
            f"`{name}` {context['what']}"
            if context["what"].startswith("must ")
            else context["what"]
        )
        return what, context["fix"], context["why"]
    if kind == "missing":
        return (
            f"`{name}` is missing in {origins.level(key[:-1])}",
            f"add `{name}: ...`{_of(about)}",
            None,
        )
    if kind == "extra_forbidden":
        return *_unknown_key(key, origins), None
    if kind in EXPECTED:
        what = f"`{name}` must be {EXPECTED[kind]}, got {described(value)}"
        return what, _retype(EXPECTED[kind], value, about), None
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        limit = f"{words} {_short(context[bound])}"
        fix = f"write a number {limit}{_of(about)}"
        return f"`{name}` must be {limit}, got {value}", fix, None
    if kind == "finite_number":
        fix = f"write a finite number{_of(about)}"
        return f"`{name}` must be a finite number, got {value}", fix, None
    if kind == "literal_error":
        return *not_a_choice(name, value, context["expected"]), None
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return *_kind_of_stage(value, origins.level(key)), None
    if kind in ("too_short", "string_too_short"):
        fix = f"give {'one or more' if kind == 'too_short' else 'a text'}{_of(about)}"
        return f"`{name}` is empty", fix, None
    if kind == "string_pattern_mismatch":
        what = f"`{name}` must begin with a letter or a digit and hold only these, `.`, `_` and `-`"
        return f"{what}; got {described(value)}", "choose a name that can be a directory", None
    return f"`{name}`: {item['msg']}", f"write another value{_of(about)}", None


def _name(key: Key) -> str:
    """The last word of a key, with the list where it is an index."""
    for end in range(len(key), 0, -1):
        if isinstance(key[end - 1], str):
            return ".".join(str(part) for part in key[end - 1 :])
    return "the recipe"


def described(value: object) -> str:
    """A value in words, for `got ...`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "a mapping"


def _of(about: str) -> str:
    """A field's description, behind what to write there."""
    return f" ({about})" if about else ""


def _short(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _retype(expected: str, value: object, about: str) -> str:
    """How to make the value one of the type that is meant."""
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
        return "put `- ` in front of it: a list of one is a list too"
    return hint


def not_a_choice(name: str, value: object, expected: str) -> tuple[str, str]:
    """What is wrong and how to mend it, where a value is none of those that there are."""
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(",")]
    listed = ", ".join(f"`{choice}`" for choice in choices)
    near = did_you_mean(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean `{near}`?" if near else ""
    what = f"`{name}` must be one of {listed}, got {described(value)}{hint}"
    if name == "loss_type" and value == "sigmoid" and "dpo" in choices:
        return what, "write `dpo`: the same loss under another name"
    if name == "loss_type" and (loss := find_loss(value)) is not None:
        return what, f"`{value}` is a loss of stages of kind {loss.kind}: give it there"
    return what, f"write {f'`{near}`' if near else f'one of {listed}'}"


def _kind_of_stage(stage: object, level: str) -> tuple[str, str]:
    kinds = ", ".join(f"`{kind}`" for kind in STAGE_KINDS)
    kind = stage.get("kind") if isinstance(stage, dict) else None
    if kind is None:
        return f"`kind` is missing in {level}", f"add `kind: ...`, one of {kinds}"
    near = did_you_mean(str(kind), list(STAGE_KINDS))
    hint = f"; did you mean `{near}`?" if near else ""
    return f"{level} has the unknown kind `{kind}`{hint}", f"write one of {kinds}"


def _unknown_key(key: Key, origins: Origins) -> tuple[str, str]:
    name, level = str(key[-1]), origins.level(key[:-1])
    known = fields_at(key[:-1], origins.data)
    ours = SYNONYMS.get(name, name)
    unknown = f"unknown key `{name}` in {level}"
    if ours in known:
        return f"{unknown}; did you mean `{ours}`?", f"write `{ours}`: {known[ours]}"
    if name == "shuffle":
        return unknown, "write it under `training_args`; without it each epoch is a new permutation"
    if key[0] == "defaults" and ours in NOT_DEFAULTS:
        return f"`{name}` cannot be a default", "give it in each stage"
    elsewhere = places().get(ours, [])
    if elsewhere:
        renamed = f", as `{ours}`" if ours != name else ""
        what = f"`{name}` does not belong in {level}"
        return what, f"it belongs in {_listed(elsewhere[:3])}{renamed}"
    near = did_you_mean(name, list(known))
    if near:
        return f"{unknown}; did you mean `{near}`?", f"write `{near}`: {known[near]}"
    if (key[0], len(key)) in (("stages", 3), ("defaults", 2)):
        return unknown, "put fields of `transformers.TrainingArguments` under `training_args`"
    far = did_you_mean(name, list(places()))
    if far:
        return f"{unknown}; did you mean `{far}`?", f"it belongs in {_listed(places()[far][:3])}"
    return unknown, f"the keys here are {_listed([f'`{field}`' for field in known], 'and')}"


def _listed(words: Iterable[str], last: str = "or") -> str:
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
