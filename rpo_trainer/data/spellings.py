"""Tool calls and thinking in the spellings that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rpo_trainer.data.rows import THINKING, Message

_THOUGHT = re.compile(r"\s*(<think>)?(.*?)</think>(.*)", re.DOTALL)


def thinking_apart(message: Message) -> Message:
    """A turn of the assistant whose content begins with `<think>...</think>` (or ends what the generation
    prompt began, without `<think>`), with that in a key of its own."""
    if message["role"] != "assistant" or any(message.get(key) for key in THINKING):
        return message
    found = _THOUGHT.fullmatch(message["content"])
    if found is None or "<think>" in found[2] or not found[2].strip():
        return message
    return {**message, "content": found[3].lstrip(), "reasoning_content": found[2].strip()}


def call_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then with every call as `{"type", "function": {...}}`: its arguments an
    object, as most templates read them, or JSON as text, as OpenAI's messages have them."""
    yield messages
    for as_text in (False, True):
        yield [
            {**m, "tool_calls": [_spelled(call, as_text) for call in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]


def writes_python(messages: list[Message], text: str) -> bool:
    """Whether arguments are in `text` as Python writes an object, which is not JSON: the template
    expects text."""
    found = [
        call.get("function", call).get("arguments")
        for message in messages
        for call in message.get("tool_calls") or ()
    ]
    return any(
        a and isinstance(a, dict) and str(a) in text and str(a) != json.dumps(a) for a in found
    )


def _spelled(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        rest, function = {k: v for k, v in call.items() if k != "function"}, call["function"]
    else:
        function = {k: v for k, v in call.items() if k in ("name", "arguments")}
        rest = {k: v for k, v in call.items() if k not in ("name", "arguments")}
    arguments = function.get("arguments")
    if as_text and arguments is not None and not isinstance(arguments, str):
        function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"type": "function", **rest, "function": function}
