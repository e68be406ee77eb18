"""Parts of a raw row that every format reads, or refuses, alike: tools, system prompt, variables of the
chat template, media, nulls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rpo_trainer.data.conversation import with_system
from rpo_trainer.data.messages import is_messages
from rpo_trainer.data.rows import MEDIA, Row, RowError, check_text, is_blank, is_empty
from rpo_trainer.recipe.template_kwargs import COLUMN, Kwargs, fault_of, merged

Raw = Mapping[str, Any]


def tools(row: Raw) -> Row:
    """`tools` as a list of {"type": "function", "function": {...}}, the form templates expect.

    It may be one tool, and JSON text as a whole or in each of its parts.
    """
    tools = _from_json(row.get("tools"), "tools")
    if not tools:
        return {}
    if isinstance(tools, Mapping):
        tools = [tools]
    if isinstance(tools, list):
        tools = [_from_json(tool, "tools") for tool in tools]
    if not is_messages(tools):
        raise RowError("`tools` is not a list of objects", code="data.wrong-type")
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return {"tools": wrapped}


def template_kwargs(row: Raw, new: Row, of_source: Kwargs | None, of_model: Kwargs | None) -> Row:
    """The variables of the chat template that a row is rendered with (`chat_template_kwargs`).

    Args:
        row: its own column, an object or the JSON text of one, goes before the others.
        new: the converted row; those of the model are for messages, since no template renders a text.
    """
    given = _from_json(row.get(COLUMN), COLUMN)
    if is_empty(given) and not isinstance(given, Mapping):
        given = {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RowError(f"`{COLUMN}` is not an object", code="data.wrong-type")
    for name, value in given.items():
        if (fault := fault_of(name, value)) is not None:
            raise RowError(f"in `{COLUMN}`: {fault.what}", code="data.bad-template-kwargs")
    text = "messages" not in new and isinstance(new["prompt"], str)
    found = merged(None if text else of_model, of_source, given)
    return {COLUMN: found} if found else {}


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"`{column}` is text that is not JSON", code="data.invalid-json") from None


def unread_system(new: Row, raw: Raw) -> list[str]:
    """Puts the row's `system` where it belongs; names it where there is no such place."""
    system = raw.get("system")
    if is_empty(system):
        return []
    text = check_text(system, "`system`")
    what = "`messages`" if "messages" in new else "the prompt"
    return [] if is_blank(text) or with_system(new, text, what) else ["system"]


def refuse_media(row: Raw) -> None:
    """Raises RowError where a column of images, audio or video is not empty."""
    for column in MEDIA:
        if not is_empty(row.get(column)):
            raise RowError(
                f"`{column}` is not empty, and only text can be trained on", code="data.not-text"
            )


def without_nulls(row: Raw) -> Row:
    """The row without the null keys that Arrow gives every object of a column.

    `attributes` stays as it is: there a null says that nobody has rated.
    """
    return {
        name: _filled(value) if isinstance(value, list | dict) and name != "attributes" else value
        for name, value in row.items()
    }


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
