"""`chat_template_kwargs`: variables of a chat template, such as `enable_thinking`.

Those of a row take precedence over those of its source, and these over those of the model, key by key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rpo_trainer.errors import RecipeError

COLUMN = "chat_template_kwargs"
Kwargs = Mapping[str, Any]

_OF_ROWS = "the rows set it"
_OF_TRAINING = "the trainer sets it"
_OF_TOKENIZER = "the tokenizer sets it"
# Arguments of transformers' `apply_chat_template`, and where each is set instead.
RESERVED = {
    "messages": _OF_ROWS, "conversation": _OF_ROWS, "tools": _OF_ROWS,
    "add_generation_prompt": _OF_TRAINING, "continue_final_message": _OF_TRAINING,
    "tokenize": _OF_TRAINING, "return_dict": _OF_TRAINING, "return_tensors": _OF_TRAINING,
    "return_assistant_tokens_mask": _OF_TRAINING, "tokenizer_kwargs": _OF_TRAINING,
    "padding": _OF_TRAINING, "truncation": _OF_TRAINING, "max_length": _OF_TRAINING,
    "sanitize_control_tokens": "`special_tokens` of the source sets it",
    "chat_template": "`chat_template` of the model sets it",
    "strftime_now": "chat templates get a fixed date, so that the tokens do not change every day",
    "bos_token": _OF_TOKENIZER, "eos_token": _OF_TOKENIZER, "pad_token": _OF_TOKENIZER,
    "unk_token": _OF_TOKENIZER, "sep_token": _OF_TOKENIZER, "cls_token": _OF_TOKENIZER,
    "mask_token": _OF_TOKENIZER,
}  # fmt: skip


class Fault(NamedTuple):
    """The texts of the error of a variable."""

    what: str
    why: str
    fix: str
    code: str


def fault_of(name: str, value: Any) -> Fault | None:
    """Return the error of a variable; None if it is valid."""
    if name in RESERVED:
        return Fault(
            f"`{name}` cannot be set here: {RESERVED[name]}",
            "the two values could contradict each other",
            f"remove `{name}`",
            code="template.reserved-variable",
        )
    if not name.isidentifier():
        return Fault(
            f"{name!r} is not a valid variable name",
            "a chat template reads variables by name",
            "use letters, digits and underscores, or remove it",
            code="template.invalid-variable",
        )
    if name == "documents" and not _are_documents(value):
        return Fault(
            "`documents` is not a list of objects",
            "chat templates iterate over them",
            "write a list, such as [{title: ..., text: ...}]",
            code="template.invalid-variable",
        )
    return None


def faults(kwargs: object) -> list[str]:
    """Return a sentence for each error of an argument `chat_template_kwargs`; [] for None."""
    if kwargs is None:
        return []
    if not isinstance(kwargs, Mapping):
        return [f"{COLUMN} must be a dict or a JSON object, got {kwargs!r}"]
    found = [fault_of(str(name), value) for name, value in kwargs.items()]
    return [f"{COLUMN}: {fault.what}" for fault in found if fault]


def _are_documents(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
    )


def problems(kwargs: Kwargs | None, where: str) -> Iterator[RecipeError]:
    """Yield an error for each variable that cannot be set."""
    for name, value in (kwargs or {}).items():
        if (fault := fault_of(name, value)) is not None:
            yield RecipeError(
                fault.what,
                code=fault.code,
                where=f"{where}.{name}",
                why=fault.why,
                fix=fault.fix,
            )


def merged(*levels: Kwargs | None) -> dict[str, Any]:
    """Merge the variables of all levels; later levels take precedence."""
    return {name: value for level in levels for name, value in (level or {}).items()}


def kwargs_key(kwargs: Kwargs | None) -> str:
    """Return a text that is equal for equal variables; empty for none."""
    return json.dumps(kwargs, sort_keys=True, default=str) if kwargs else ""
