"""Determine what a chat template writes after an assistant's text, and the tokens that mark its turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rpo_trainer.data.rows import Message, RowError

Render = Callable[[list[Message], bool], str]  # messages, with the generation prompt → text

SENTINEL = "\ue00frpo\ue00e"
UNCLEAR = "the chat template rewrites the conversation so that an assistant turn cannot be found"
USER: Message = {"role": "user", "content": "a"}


@dataclass(frozen=True)
class Controls:
    """Texts of a tokenizer's added tokens, longest first; `thoughts`: the thinking markers among them."""

    names: tuple[str, ...]
    thoughts: tuple[str, ...] = ()

    def thoughts_at_end(self, text: str) -> int:
        """Return the start of thinking markers at the end of `text`, or its length if there are none."""
        place, end = len(text), len(text.rstrip())
        while name := next((n for n in self.thoughts if text.endswith(n, 0, end)), ""):
            place = end - len(name)
            end = len(text[:place].rstrip())
        return place

    def starts(self, text: str) -> int:
        """Return the end of the token at the beginning of `text`, after white space; 0 for none."""
        blank = len(text) - len(text.lstrip())
        return blank + next((len(n) for n in self.names if text.startswith(n, blank)), -blank)

    def ends(self, text: str) -> bool:
        """Whether `text` ends with a token."""
        return text.endswith(self.names)

    def common(self, first: str, second: str) -> int:
        """Return the length of the common prefix that does not end inside a token of either text."""
        low, high = 0, min(len(first), len(second))
        while low < high:  # bisection, since slice comparison is fast
            middle = (low + high + 1) // 2
            low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
        ends = [self._inside(text, low) for text in (first, second)]
        return min(ends)

    def shared_opener(self, head: str, first: str) -> str:
        """Return the token at the end of `head` if it is one of those at the beginning of `first`."""
        head = head.rstrip()
        last = next((name for name in self.names if head.endswith(name)), "")
        while end := self.starts(first):
            if last and first[:end].endswith(last):
                return last
            first = first[end:]
        return ""

    def _inside(self, text: str, place: int) -> int:
        """Return the start of the token that contains `place`, or `place` if there is none."""
        for name in self.names:
            begin = text.find(name, max(0, place - len(name) + 1), place + len(name) - 1)
            if 0 <= begin < place:
                return begin
        return place


@dataclass(frozen=True)
class Ending:
    """What a template writes after the content of an assistant turn without tool calls.

    Attributes:
        last: text after the last turn.
        between: text before the content of a following user turn; None if that cannot be rendered.
        marker: the part of `last` that ends the turn; the rest ends the conversation.
        heading: text between a prompt and the content, in a template without a generation prompt.
        opening: text between the content of a user turn and that of the assistant turn.
        opener: token at the beginning of all turns, in a template that always opens another assistant turn
            after every turn; otherwise empty.
    """

    last: str
    between: str | None
    marker: str
    heading: str
    opening: str
    opener: str = ""

    @property
    def open(self) -> bool:
        """Whether a turn has no end marker, and is ended by the token that opens the next turn."""
        return not self.last.strip()

    def without_opener(self, text: str, place: int) -> int:
        """Move `place` in `text` before a preceding token that opens a turn."""
        head = text[:place].rstrip()
        has_opener = self.opener and head.endswith(self.opener)
        return len(head) - len(self.opener) if has_opener else place


def find_ending(render: Render, controls: Controls) -> Ending:
    """Determine the ending of a template by rendering conversations with one and two user turns."""
    assistant = {"role": "assistant", "content": SENTINEL}
    user = {"role": "user", "content": SENTINEL}
    text = render([USER, assistant], False)
    if SENTINEL not in text:
        raise RowError(UNCLEAR, code="template.turn-not-found")
    last = text.rpartition(SENTINEL)[2].rstrip()
    prompt = render([user], True).rpartition(SENTINEL)[2]
    try:
        parts = render([user, assistant, user], False).split(SENTINEL)
    except RowError:
        parts = []
    if len(parts) != 4:
        return Ending(last, None, last, "", prompt)
    opening, between = parts[1:3]
    place = controls.common(last, between)
    heading = opening[len(prompt) :] if opening.startswith(prompt) else ""
    opener, rest = "", last[place:]
    if (
        rest.strip()
        and prompt == parts[3]
        and prompt.rstrip().endswith(rest)
        and opening.startswith(prompt)
    ):
        opener, heading = controls.shared_opener(last[:place], parts[0]), ""
    ending = Ending(last, between, last, heading if heading.strip() else "", opening, opener)
    shared = last[: ending.without_opener(last, place)].rstrip()
    if last[len(shared) :].strip() and not controls.ends(shared):
        shared = ""
    return replace(ending, marker=shared or last)


def with_sentinel(message: Message) -> Message:
    """Return the message with SENTINEL as its content."""
    return {**message, "content": SENTINEL}


def with_last_sentinel(message: Message) -> Message:
    """Return the message with SENTINEL as its last text, in its last tool call if it has one."""
    calls = message.get("tool_calls")
    if not calls:
        return with_sentinel(message)
    function = calls[-1].get("function", calls[-1])
    arguments: object = {"a": SENTINEL}
    if isinstance(function.get("arguments"), str):
        arguments = f'{{"a": "{SENTINEL}"}}'
    function = {**function, "arguments": arguments}
    last = {**calls[-1], "function": function} if "function" in calls[-1] else function
    return {**message, "tool_calls": [*calls[:-1], last]}
