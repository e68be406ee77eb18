"""`chat_template_kwargs`: variables of a chat template, such as `enable_thinking`, and where they come from.

A row's own go before those of its source, and these before those of the model, key by key.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_trainer.errors import Problems, RecipeError, RPOTrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rpo_trainer.data.rows import Row

COLUMN = "chat_template_kwargs"
Kwargs = Mapping[str, Any]

_OF_ROWS = "it comes from the rows"
_OF_TRAINING = "it is set wherever a conversation is rendered"
_OF_TOKENIZER = "it comes from the tokenizer"
# Names that apply_chat_template of transformers takes for itself, and why none of them can be set here.
RESERVED = {
    "messages": _OF_ROWS, "conversation": _OF_ROWS, "tools": _OF_ROWS,
    "add_generation_prompt": _OF_TRAINING, "continue_final_message": _OF_TRAINING,
    "tokenize": _OF_TRAINING, "return_dict": _OF_TRAINING, "return_tensors": _OF_TRAINING,
    "return_assistant_tokens_mask": _OF_TRAINING, "tokenizer_kwargs": _OF_TRAINING,
    "padding": _OF_TRAINING, "truncation": _OF_TRAINING, "max_length": _OF_TRAINING,
    "sanitize_control_tokens": "it is set by `special_tokens` of the source",
    "chat_template": "it is set by `chat_template` of the model",
    "strftime_now": "templates get a fixed date, so that the tokens stay the same",
    "bos_token": _OF_TOKENIZER, "eos_token": _OF_TOKENIZER, "pad_token": _OF_TOKENIZER,
    "unk_token": _OF_TOKENIZER, "sep_token": _OF_TOKENIZER, "cls_token": _OF_TOKENIZER,
    "mask_token": _OF_TOKENIZER,
}  # fmt: skip


class Fault(NamedTuple):
    """What keeps a name and its value from being a variable of a chat template, as errors say it."""

    what: str
    why: str
    fix: str


def fault_of(name: str, value: Any) -> Fault | None:
    """What is wrong with a variable; None: nothing."""
    if name in RESERVED:
        return Fault(
            f"`{name}` cannot be set here: {RESERVED[name]}",
            "a second value would contradict the first",
            f"remove `{name}`",
        )
    if not name.isidentifier():
        return Fault(
            f"{name!r} is not a valid variable name",
            "a chat template reads variables by name",
            "use letters, digits and underscores, or remove it",
        )
    if name == "documents" and not _are_documents(value):
        return Fault(
            "`documents` is not a list of objects",
            "a chat template writes them one by one",
            "write a list, such as [{title: ..., text: ...}]",
        )
    return None


def faults(kwargs: object) -> list[str]:
    """A sentence on each fault of an argument `chat_template_kwargs`; [] for None."""
    if kwargs is None:
        return []
    if not isinstance(kwargs, Mapping):
        return [f"{COLUMN} must be a dict or the JSON text of one, got {kwargs!r}"]
    found = [fault_of(str(name), value) for name, value in kwargs.items()]
    return [f"{COLUMN}: {fault.what}" for fault in found if fault]


def _are_documents(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
    )


def parse_kwargs(words: Sequence[str], option: str = "--kwargs") -> dict[str, Any] | None:
    """Variables from the command line, each as `name=value` with a value in YAML; None for no words.

    Raises:
        RecipeError, or Problems: words that are none.
    """
    from rpo_trainer.recipe.overrides import apply_override, parse_overrides

    found: dict[str, Any] = {}
    overrides, errors = parse_overrides(words)
    for override in overrides:
        try:
            apply_override(found, override)
        except RecipeError as error:
            errors.append(error)
    problems: list[RPOTrainerError] = [
        RecipeError(
            error.what,
            where=f"{option} {(error.where or '').removeprefix('override ')}",
            why="each word sets one variable of the chat template",
            fix="write name=value, for example enable_thinking=false; the value is YAML, so a text with "
            "special characters needs quotes",
        )
        for error in errors
    ]
    problems += _problems(found, option)
    if problems:
        raise Problems(problems) if len(problems) > 1 else problems[0]
    return found or None


def _problems(kwargs: Kwargs | None, where: str) -> Iterator[RecipeError]:
    for name, value in (kwargs or {}).items():
        if (fault := fault_of(name, value)) is not None:
            yield RecipeError(fault.what, where=f"{where}.{name}", why=fault.why, fix=fault.fix)


def merged(*levels: Kwargs | None) -> dict[str, Any]:
    """The variables of all levels; of one that several set, the last."""
    return {name: value for level in levels for name, value in (level or {}).items()}


def kwargs_key(kwargs: Kwargs | None) -> str:
    """A text that is the same for equal variables; empty for none."""
    return json.dumps(kwargs, sort_keys=True, default=str) if kwargs else ""


def kwargs_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The variables of each row."""
    return [row.get(COLUMN) or {} for row in rows]


def variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The variables that the chat template reads, of several templates any of them; empty without one."""
    given = tokenizer.chat_template
    texts = given.values() if isinstance(given, Mapping) else [given] if given else []
    return frozenset(name for text in texts for name in _variables(str(text)))


@cache
def _variables(template: str) -> frozenset[str]:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from rpo_trainer.data.template_reads import outer_reads

    try:
        environment = _compile_jinja_template(template).environment
        return frozenset(outer_reads(environment.parse(template)) - set(environment.globals))
    except jinja2.TemplateError:
        return frozenset()  # rendering says what is wrong with it


def unread(kwargs: Kwargs | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those of `kwargs` that the chat template does not read."""
    return sorted(set(kwargs or ()) - variables(tokenizer))


def check_kwargs(kwargs: Kwargs | None, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises RecipeError: a name that is no variable, or one that the chat template does not read."""
    for problem in _problems(kwargs, where):
        raise problem
    names = unread(kwargs, tokenizer)
    if not names:
        return
    if not tokenizer.chat_template:
        what, why = "the tokenizer has no chat template", "nothing would read these variables"
        fix = "remove them, or set `chat_template`"
    else:
        what = f"the chat template does not read {_listed(names)}"
        why = "what it writes would be the same without"
        fix = "remove it; the template reads " + (
            _listed(sorted(variables(tokenizer) - set(RESERVED))) or "no variable of its own"
        )
    raise RecipeError(what, where=f"{where}.{names[0]}", why=why, fix=fix)


def _listed(names: Collection[str] | Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
