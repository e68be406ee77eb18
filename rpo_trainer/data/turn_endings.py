"""What a chat template writes after the assistant's words, and the tokens that it marks turns with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rpo_trainer.data.rows import Message, RowError

Render = Callable[[list[Message], bool], str]  # messages, with the generation prompt → text

SENTINEL = "\ue00frpo\ue00e"
UNCLEAR = "the chat template rewrites the conversation so that the assistant's turn cannot be found"
USER: Message = {"role": "user", "content": "a"}


@dataclass(frozen=True)
class Controls:
    """The texts of a tokenizer's added tokens, longest first; `thoughts`: those around thinking."""

    names: tuple[str, ...]
    thoughts: tuple[str, ...] = ()

    def thoughts_at_end(self, text: str) -> int:
        """Where the marks of thinking begin that `text` ends with, blanks aside; else its length."""
        place, end = len(text), len(text.rstrip())
        while name := next((n for n in self.thoughts if text.endswith(n, 0, end)), ""):
            place = end - len(name)
            end = len(text[:place].rstrip())
        return place

    def starts(self, text: str) -> int:
        """Where the token ends that `text` begins with, after blanks; 0 for none."""
        blank = len(text) - len(text.lstrip())
        return blank + next((len(n) for n in self.names if text.startswith(n, blank)), -blank)

    def ends(self, text: str) -> bool:
        """Whether `text` ends with a token."""
        return text.endswith(self.names)

    def common(self, first: str, second: str) -> int:
        """Length of the common prefix; it does not end inside a token of either text."""
        low, high = 0, min(len(first), len(second))
        while low < high:  # bisection: slices are compared by the interpreter's own loop
            middle = (low + high + 1) // 2
            low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
        cut = [self._inside(text, low) for text in (first, second)]
        return min(cut)

    def shared_opener(self, head: str, first: str) -> str:
        """The token at the end of `head` that is also one of those that `first` begins with."""
        head = head.rstrip()
        last = next((name for name in self.names if head.endswith(name)), "")
        while end := self.starts(first):
            if last and first[:end].endswith(last):
                return last
            first = first[end:]
        return ""

    def _inside(self, text: str, place: int) -> int:
        """The beginning of the token that `place` is inside of, else `place`."""
        for name in self.names:
            begin = text.find(name, max(0, place - len(name) + 1), place + len(name) - 1)
            if 0 <= begin < place:
                return begin
        return place


@dataclass(frozen=True)
class Ending:
    """What a template writes after the words of an assistant turn without calls.

    Attributes:
        last: after a turn that is the last one.
        between: between it and the words of the user after it; None where that cannot be rendered.
        marker: of `last`, the part that ends the turn; the rest ends the conversation.
        heading: what stands between a prompt and the words in a template without generation prompt.
        opening: what stands between the words of the user and those of the assistant.
        opener: the token that all turns begin with, in a template that opens the next turn of the
            assistant after every turn, asked for or not; else none.
    """

    last: str
    between: str | None
    marker: str
    heading: str
    opening: str
    opener: str = ""

    @property
    def open(self) -> bool:
        """Whether the token that opens the next turn ends one."""
        return not self.last.strip()

    def without_opener(self, text: str, place: int) -> int:
        """`place` in `text`, in front of the token that opens a turn where it stands behind one."""
        head = text[:place].rstrip()
        cut = self.opener and head.endswith(self.opener)
        return len(head) - len(self.opener) if cut else place


def learn_ending(render: Render, controls: Controls) -> Ending:
    """The ending of a template, from conversations of one and two questions."""
    said = {"role": "assistant", "content": SENTINEL}
    asked = {"role": "user", "content": SENTINEL}
    alone = render([USER, said], False)
    if SENTINEL not in alone:
        raise RowError(UNCLEAR, code="template.turn-not-found")
    last = alone.rpartition(SENTINEL)[2].rstrip()
    prompt = render([asked], True).rpartition(SENTINEL)[2]
    try:
        parts = render([asked, said, asked], False).split(SENTINEL)
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
    """The message with SENTINEL as its content."""
    return {**message, "content": SENTINEL}


def with_last_sentinel(message: Message) -> Message:
    """The message with SENTINEL as the last of its words: in its last call, where it has one."""
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
