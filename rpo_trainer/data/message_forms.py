"""Tool calls, thinking and content in the forms that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.rows import THINKING, Message
from rpo_trainer.data.turn_endings import SENTINEL

_MARKED = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_UNOPENED = re.compile(r"(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class ThinkingForms:
    """Forms of thinking in the content of a turn that are moved to a separate key.

    Attributes:
        marked: `<think>...</think>` at the beginning.
        unopened: `...</think>` at the beginning, for generation prompts that end with `<think>`.
    """

    marked: bool
    unopened: bool

    def apart(self, message: Message) -> Message:
        """Return an assistant turn with its thinking moved to a separate key."""
        if message["role"] != "assistant" or any(message.get(key) for key in THINKING):
            return message
        found = _MARKED.fullmatch(message["content"]) if self.marked else None
        if self.unopened and "<think>" not in message["content"].partition("</think>")[0]:
            found = _UNOPENED.fullmatch(message["content"])
        if found is None or "<think>" in found[1] or not found[1].strip():
            return message
        return {**message, "content": found[2].lstrip(), "reasoning_content": found[1].strip()}


def find_thinking_forms(written: Callable[[Message], str | None], *, opened: bool) -> ThinkingForms:
    """Find the forms that a template renders differently in the content and in a separate key.

    Args:
        written: renders a conversation that ends with the given assistant turn; None if the template
            refuses it.
        opened: the generation prompt ends with an opening thinking marker.
    """
    every = ThinkingForms(marked=True, unopened=True)

    def reads(content: str) -> bool:
        inside = {"role": "assistant", "content": content}
        texts = [written(turn) for turn in (inside, every.apart(inside))]
        dense = ["".join((text or "").split()) for text in texts]
        return SENTINEL in dense[1] and dense[0] != dense[1]

    block = f"{SENTINEL}\n</think>\n\nb"
    return ThinkingForms(reads(f"<think>\n{block}"), opened and reads(block))


def with_thinking(message: Message) -> Message:
    """Return the message with its thinking under every key that templates read, like transformers."""
    thought = next((message[key] for key in THINKING if message.get(key)), None)
    return message if thought is None else {**message, **dict.fromkeys(THINKING, thought)}


def in_parts(message: Message) -> Message:
    """Return the message with its content as a list of one part."""
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def call_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages with tool calls in each form that templates read.

    First unchanged, then as `{"type", "function": {...}}` with arguments as an object (the form that most
    templates read), then with arguments as JSON text (the form of OpenAI's messages).
    """
    yield messages
    for as_text in (False, True):
        yield [
            {**m, "tool_calls": [_spelled(call, as_text) for call in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]


def writes_python(messages: list[Message], text: str) -> bool:
    """Whether `text` contains arguments as a Python literal, because the template expects JSON text."""
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
