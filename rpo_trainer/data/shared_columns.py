"""Columns that all formats handle in the same way: tools, system prompt, template variables, media, nulls."""

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
    """Return `tools` as a list of {"type": "function", "function": {...}}, which templates expect.

    A single tool and JSON text, of the list or of its items, are also accepted.
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
    """Return the variables of the chat template for a row (`chat_template_kwargs`).

    Args:
        row: its column, an object or JSON text of one, takes precedence over the others.
        new: the converted row; variables of the model apply only to messages, since text is not rendered.
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
    """Add the row's `system` to its conversation; return its name if that is not possible."""
    system = raw.get("system")
    if is_empty(system):
        return []
    text = check_text(system, "`system`")
    what = "`messages`" if "messages" in new else "the prompt"
    return [] if is_blank(text) or with_system(new, text, what) else ["system"]


def refuse_media(row: Raw) -> None:
    """Raise RowError if a column of images, audio or video is not empty."""
    for column in MEDIA:
        if not is_empty(row.get(column)):
            raise RowError(f"`{column}` is not empty; only text is supported", code="data.not-text")


def without_nulls(row: Raw) -> Row:
    """Remove the null keys that Arrow adds to every object of a column.

    In `attributes` a null means "not rated" and is kept.
    """
    return {
        name: _filled(value) if isinstance(value, list | dict) and name != "attributes" else value
        for name, value in row.items()
    }


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
