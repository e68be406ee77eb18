"""Tool calls, thinking and content in the spellings that chat templates read."""

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
    """How thinking inside the content of a turn is recognized.

    Attributes:
        marked: `<think>...</think>` at the beginning goes into a key of its own.
        unopened: `...</think>` at the beginning does, without `<think>`: the generation prompt has it.
    """

    marked: bool
    unopened: bool

    def apart(self, message: Message) -> Message:
        """The assistant's turn with its thinking in a key of its own."""
        if message["role"] != "assistant" or any(message.get(key) for key in THINKING):
            return message
        found = _MARKED.fullmatch(message["content"]) if self.marked else None
        if self.unopened and "<think>" not in message["content"].partition("</think>")[0]:
            found = _UNOPENED.fullmatch(message["content"])
        if found is None or "<think>" in found[1] or not found[1].strip():
            return message
        return {**message, "content": found[2].lstrip(), "reasoning_content": found[1].strip()}


def learn_thinking(written: Callable[[Message], str | None], *, opened: bool) -> ThinkingForms:
    """The forms that a template writes differently in the content than in a key that it reads.

    Args:
        written: a conversation with this turn of the assistant at the end; None where it is refused.
        opened: the generation prompt ends with a mark that opens the thinking.
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
    """The message with its thinking under every name that templates know, as newer transformers do."""
    thought = next((message[key] for key in THINKING if message.get(key)), None)
    return message if thought is None else {**message, **dict.fromkeys(THINKING, thought)}


def in_parts(message: Message) -> Message:
    """The message with its text as a list of one part."""
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


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
