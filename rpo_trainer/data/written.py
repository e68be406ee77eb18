"""What of a row's messages a chat template has written, and what it left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rpo_trainer.data.chat import ChatRenderer, Rendered, Tools, trained_turns
from rpo_trainer.data.rows import THINKING, Message, RowError, leaf_texts


@dataclass
class LeftOut:
    """What does not reach the tokens: `keys` of messages and `tools`, and reasons to warn of the row,
    one for each turn (keys of WARNINGS)."""

    keys: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def left_out(
    renderer: ChatRenderer, talk: Sequence[Message], tools: Tools, rendered: Rendered
) -> LeftOut:
    """What the template does not write, or not in every turn.

    Args:
        rendered: `talk` as `renderer` gives it.

    Raises:
        RowError: tool calls that it does not write.
    """
    text = Written(rendered.text)
    found = LeftOut(set(renderer.unread_keys(talk, tools, rendered)))
    turns = trained_turns(talk)
    turns = turns[len(turns) - len(rendered.spans) :]
    spans = dict(zip(turns, rendered.spans, strict=True))
    for number, message in enumerate(renderer.as_read(talk, tools)):
        own = whole = text
        if number in spans:
            begin, end = spans[number]
            own = Written(rendered.text[begin:end])
            # The generation prompt may have begun the thinking.
            begin = renderer.thought_begins(rendered.text[:begin])
            whole = Written(rendered.text[begin:end])
        for call in message.get("tool_calls") or ():
            called = call.get("function", call)
            if not own.has(str(called.get("name") or "")):
                raise RowError("the chat template does not write the assistant's `tool_calls`")
            if not own.has_all(leaf_texts(called.get("arguments"))):
                found.keys.add("tool_calls")
        thoughts = [message[key] for key in THINKING if message.get(key)]
        content = list(leaf_texts(message["content"]))
        # Thinking that the answer repeats is looked for beside the answer.
        if not whole.has_all(content) or not whole.without(content).has_all(leaf_texts(thoughts)):
            said = message["role"] == "assistant"
            found.warnings.append("text_left_out" if said else "prompt_text_left_out")
        for key in message.keys() - {"role", "content", "weight", "tool_calls", *THINKING}:
            if not text.has_all(leaf_texts(message[key])):
                found.keys.add(key)
    return found


class Written:
    """What a template has written: whether a text of the data is in it.

    Templates trim texts, put thinking on lines of its own, and write some texts as JSON.
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

    def has_all(self, texts: Iterable[str]) -> bool:
        return all(map(self.has, texts))

    def without(self, texts: Iterable[str]) -> Written:
        """The rest, without the last place of each of the texts."""
        dense = self._dense
        for form in map(_without_blanks, texts):
            before, found, after = dense.rpartition(form)
            dense = f"{before}\n{after}" if found else dense
        return Written(dense)


def _forms(text: str) -> tuple[str, ...]:
    return (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])


def _without_blanks(text: str) -> str:
    return "".join(text.split())
