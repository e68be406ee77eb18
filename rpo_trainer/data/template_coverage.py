"""Find the parts of a row's messages that a chat template omits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rpo_trainer.data.rendered import Rendered
from rpo_trainer.data.rows import THINKING, Message, RowError, leaf_texts
from rpo_trainer.data.trained_spans import ChatRenderer, Tools, trained_turns

CALLS = "the assistant's `tool_calls`"


@dataclass
class LeftOut:
    """Parts of a row that are not rendered: `keys` of messages, and `warnings` (keys of WARNINGS)."""

    keys: set[str] = field(default_factory=set)
    warnings: set[str] = field(default_factory=set)


def left_out(
    renderer: ChatRenderer, messages: Sequence[Message], tools: Tools, rendered: Rendered
) -> LeftOut:
    """Return the parts of messages that the template does not render, or not in every turn.

    Args:
        rendered: `messages` rendered by `renderer`.

    Raises:
        RowError: a tool call, or its arguments, is not rendered.
    """
    text = Written(rendered.text)
    missing = LeftOut(set(renderer.unread_keys(messages, tools, rendered)))
    turns = trained_turns(messages)
    turns = turns[len(turns) - len(rendered.spans) :]
    spans = dict(zip(turns, rendered.spans, strict=True))
    for number, message in enumerate(renderer.as_read(messages, tools)):
        turn_text = full_turn_text = text
        if number in spans:
            begin, end = spans[number]
            turn_text = Written(rendered.text[begin:end])
            # The generation prompt may contain the beginning of the thinking.
            begin = renderer.thought_begins(rendered.text[:begin])
            full_turn_text = Written(rendered.text[begin:end])
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        names = Counter(str(called.get("name") or "") for called in calls)
        if not all(map(turn_text.has, names)):
            raise RowError(
                f"the chat template does not render {CALLS}", code="template.unwritten-tool-calls"
            )
        texts = [list(leaf_texts(called.get("arguments"))) for called in calls]
        call_missing = any(turn_text.count(name) < count for name, count in names.items())
        if call_missing or any(part and not any(map(turn_text.has, part)) for part in texts):
            raise RowError(
                f"the chat template does not render all of {CALLS}",
                code="template.unwritten-tool-calls",
            )
        if not all(map(turn_text.has_all, texts)):
            missing.keys.add("tool_calls")
        thoughts = [message[key] for key in THINKING if message.get(key)]
        content = list(leaf_texts(message["content"]))
        # Search for thinking outside the answer, which may repeat it.
        missed = not full_turn_text.has_all(content) or not full_turn_text.without(content).has_all(
            leaf_texts(thoughts)
        )
        is_assistant = message["role"] == "assistant"
        if missed or (
            is_assistant
            and not thoughts
            and renderer.treats_as_thinking(full_turn_text.text, content)
        ):
            missing.warnings.add("text_left_out" if is_assistant else "prompt_text_left_out")
        for key in message.keys() - {"role", "content", "weight", "tool_calls", *THINKING}:
            if not text.has_all(leaf_texts(message[key])):
                missing.keys.add(key)
    return missing


class Written:
    """A rendered text that is searched for texts of the data.

    Templates trim texts, put thinking on separate lines, and write some texts as JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _dense(self) -> str:
        return _without_blanks(self.text)

    def has(self, text: str) -> bool:
        if text in self.text:
            return bool(text)
        return any(_without_blanks(form) in self._dense for form in _forms(text))

    def count(self, text: str) -> int:
        """Return the number of occurrences of a text, in its most frequent form."""
        return max(self._dense.count(_without_blanks(form)) for form in _forms(text)) if text else 0

    def has_all(self, texts: Iterable[str]) -> bool:
        return all(map(self.has, texts))

    def without(self, texts: Iterable[str]) -> Written:
        """Return the remainder without the last occurrence of each of the texts."""
        dense = self._dense
        for form in map(_without_blanks, texts):
            before, found, after = dense.rpartition(form)
            dense = f"{before}\n{after}" if found else dense
        return Written(dense)


def _forms(text: str) -> tuple[str, ...]:
    return (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])


def _without_blanks(text: str) -> str:
    return "".join(text.split())
