"""Find the start and the end of assistant turns in a rendered conversation.

A turn begins at the end of the generation prompt of the conversation before it. Its end is determined from
renderings with different continuations: none, a user turn, or the result of a tool. Their common text after
the content of the turn is the end marker (`<|im_end|>`). A template without end markers (GLM) ends a turn
with the token that opens the next one.

If a template renders a turn differently when others follow (it drops thinking, for example), the content of
the turn or of the next one is replaced by SENTINEL, which is then searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rpo_trainer.data.rows import Message, RowError
from rpo_trainer.data.turn_endings import (
    SENTINEL,
    UNCLEAR,
    USER,
    Controls,
    Ending,
    Render,
    with_last_sentinel,
    with_sentinel,
)

Span = tuple[int, int]
NO_END = "the chat template writes no end marker after an assistant turn"
_AROUND = 40  # characters to show on both sides of a difference


@dataclass(frozen=True)
class Found:
    """A rendered conversation and its trained turns.

    `differs` is the text before a trained turn in generation and in training, around the first difference;
    None if they are equal.
    """

    text: str
    spans: list[Span]
    differs: tuple[str, str] | None = None


@dataclass
class TurnFinder:
    """Finds the assistant's turns of one conversation.

    Args:
        prompt: render `messages` with the generation prompt.
        truncated: the last turn is truncated: its text and span end with its content.

    Raises (all methods):
        RowError: the template refuses a part of the conversation, writes no end marker, or rewrites the turns
            so that they cannot be found.
    """

    render: Render
    messages: list[Message]
    controls: Controls
    ending: Ending
    opens_turn: bool
    prompt: bool = False
    truncated: bool = False
    _prompts: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = self.render(self.messages, self.prompt)

    def found(self, turns: Sequence[int]) -> Found:
        """Return the text to train on and the spans of these turns.

        If the template renders the turns before the last one differently when it is present, but with the
        same opening, the last turn is appended to its generation prompt. For example, some templates put
        the system prompt into the last user turn.
        """
        last = len(self.messages) - 1
        closed = not self.prompt  # otherwise `text` ends with the generation prompt
        if last > 0 and closed and self.messages[last]["role"] == "assistant":
            start = self._moved(last)
            if start is not None:
                return self._after_prompt(turns, start)
        spans = [self.span(turn) for turn in turns]
        text = self.text
        if last in turns and self.truncated:
            text = text[: spans[-1][1]]
        elif last in turns and closed and (marker := self._opener()):
            text += marker
            spans[-1] = (spans[-1][0], len(text))
        starts = {turn: start for turn, (start, _) in zip(turns, spans, strict=True) if turn}
        return Found(text, spans, self._difference(starts))

    def span(self, turn: int) -> Span:
        """Return start and end of a turn in `text`."""
        if self._parted(turn):
            raise RowError(
                "the chat template writes the text of a turn with tool calls after the results of the calls",
                code="template.text-after-tool-results",
            )
        start = self._start(turn)
        last = turn == len(self.messages) - 1 and not self.prompt
        end = self._last_end() if last else self._inner_end(turn, start)
        if start >= end:
            raise RowError(UNCLEAR, code="template.turn-not-found")
        return start, end

    def _parted(self, turn: int) -> bool:
        """Whether the content of a turn with tool calls is written after the results of the calls."""
        message, *after = self.messages[turn : turn + 2]
        called = message.get("tool_calls") and message["content"].strip()
        if not called or not after or after[0]["role"] != "tool":
            return False
        places = []
        for place in (turn, turn + 1):
            marked = [*self.messages]
            marked[place] = with_sentinel(marked[place])
            places.append((self._or_none(marked) or "").find(SENTINEL))
        return 0 <= places[1] < places[0]

    # --- the text before a turn ---

    def _prompt(self, turn: int) -> str:
        """Return the prompt for generating the turn."""
        if turn not in self._prompts:
            self._prompts[turn] = self.render(self.messages[:turn], True)
        return self._prompts[turn]

    def _moved(self, last: int) -> int | None:
        """Return the start of the last turn if it must be moved after its generation prompt; otherwise None.

        That is, if `text` does not begin with the prompt, but has the same opening of the turn.
        """
        prompt = self._prompt(last)
        if self.text.startswith(prompt):
            return None
        try:
            start = self._start(last)
            marked = [*self.messages[: last - 1], with_sentinel(self.messages[last - 1])]
            opening = self.render(marked, True).rpartition(SENTINEL)
        except RowError:
            return None
        same = opening[1] and opening[2].strip() and prompt.endswith(opening[2])
        return start if same and self.text[:start].endswith(opening[2]) else None

    def _after_prompt(self, turns: Sequence[int], start: int) -> Found:
        last = len(self.messages) - 1
        before = TurnFinder(
            self.render, self.messages[:last], self.controls, self.ending, self.opens_turn, True
        )
        earlier = before.found([turn for turn in turns if turn < last])
        spans, text = earlier.spans, before.text
        if last in turns:
            turn_text = self.text[start : self._last_end()] + self._opener()
            spans = [*spans, (len(text), len(text) + len(turn_text))]
            return Found(text + turn_text, spans, earlier.differs)
        return Found(text + self.text[start:], spans, earlier.differs)

    def _difference(self, starts: Mapping[int, int]) -> tuple[str, str] | None:
        for turn, start in starts.items():
            prompt, before = self._prompt(turn), self.text[:start]
            if before != prompt:
                place = self.controls.common(prompt, before)
                view = slice(max(0, place - _AROUND), place + _AROUND)
                return prompt[view], self.text[view]
        return None

    # --- start of a turn ---

    def _start(self, turn: int) -> int:
        prompt = self._prompt(turn) if turn else ""
        if turn and self.text.startswith(prompt):
            heading = "" if self.opens_turn else self.ending.heading
            if self.text.startswith(heading, len(prompt)):
                return len(prompt) + len(heading)
        start = self._start_after_previous(turn) if turn else None
        if start is not None:
            return start
        try:
            before = self._before(turn)
        except RowError:
            start = self._start_after_previous(turn, opened=False) if turn else None
            if start is None:
                raise
            return start
        return len(before) - len(self._lead(turn, prompt, before))

    def _start_after_previous(self, turn: int, *, opened: bool = True) -> int | None:
        """Return the start of a turn, found from the content of the previous turn; None if that is not found.

        The content is followed by the opening of the turn, as in the generation prompt. The text may lack
        thinking markers with which the prompt ends, or have others.

        Args:
            opened: the text has the opening; otherwise the turn begins at the first difference, as a second
                call does that a template writes without an opening.
        """
        marked = [*self.messages]
        marked[turn - 1] = with_sentinel(marked[turn - 1])
        try:
            opening = self.render(marked[:turn], True).rpartition(SENTINEL)
            after = self.render(marked, self.prompt).rpartition(SENTINEL)
        except RowError:
            return None
        if not (opening[1] and after[1] and self.text.endswith(after[2])):
            return None
        length = self.controls.common(opening[2], after[2])
        if length < len(opening[2]):
            core = opening[2][: self.controls.thoughts_at_end(opening[2])].rstrip()
            if opened and length < len(core):
                return None
            length = self.controls.thoughts_at_end(after[2][:length])
        elif not self.opens_turn and after[2].startswith(self.ending.heading, length):
            length += len(self.ending.heading)
        return len(self.text) - len(after[2]) + length

    def _before(self, turn: int) -> str:
        """Return the part of `text` before the content of a turn, which may be empty with tool calls."""
        message = self.messages[turn]
        bare = {"role": "assistant", "content": SENTINEL}
        variants = [(with_sentinel(message), self.messages[turn + 1 :])]
        if message.get("tool_calls"):
            variants += [(bare, self.messages[turn + 1 :]), (bare, [])]
        candidates = []
        for marked, rest in variants:
            try:
                parts = self.render([*self.messages[:turn], marked, *rest], self.prompt)
            except RowError:
                continue
            before = parts.split(SENTINEL)
            if len(before) == 2 and self.text.startswith(before[0]):
                candidates.append(before[0])
        if not candidates:
            raise RowError(UNCLEAR, code="template.turn-not-found")
        return min(candidates, key=len)

    def _lead(self, turn: int, prompt: str, before: str) -> str:
        """Return what the model generates between the prompt and the content of the turn.

        Without a generation prompt this is the white space before the content, but not a heading, which
        belongs to the template.
        """
        if not turn:
            return ""
        rendered = self.render([*self.messages[:turn], with_sentinel(self.messages[turn])], False)
        rendered = rendered.partition(SENTINEL)[0]
        lead = rendered[len(prompt) :] if rendered.startswith(prompt) else ""
        own = self.opens_turn or not lead.strip()
        return lead if own and before.endswith(lead) else ""

    # --- end of a turn ---

    def _shared(self, first: str, second: str) -> int:
        """Return the length of the common prefix, without the token that opens the next turn."""
        return self.ending.without_opener(first, self.controls.common(first, second))

    def _opener(self) -> str:
        """Return the token of the next turn that ends the last one, in a template without end markers."""
        if not self.ending.open or self.truncated:
            return ""
        following = self._following()
        if following is not None:
            place = self.controls.common(self.text, following)
        else:
            following, place = self.ending.between or "", 0
        end = self.controls.starts(following[place:])
        if not end:
            raise RowError(NO_END, code="template.no-end-marker")
        return following[place : place + end]

    def _following(self) -> str | None:
        """Render the conversation with another turn; None if the template then rewrites the last one."""
        message = self.messages[-1]
        following = USER
        if calls := message.get("tool_calls"):
            name = str(calls[0].get("function", calls[0]).get("name") or "")
            following = {"role": "tool", "content": "a", "name": name}
            if "id" in calls[0]:
                following["tool_call_id"] = calls[0]["id"]
        text = self._or_none([*self.messages, following])
        if text in (None, self.text):  # the template refuses the next turn, or omits it
            return None
        place = self._shared(self.text, text)
        return text if self.ending.last.endswith(self.text[place:].rstrip()) else None

    def _last_end(self) -> int:
        """Return the end of the last turn, without text that only ends the conversation."""
        ending, text = self.ending, self.text.rstrip()
        if self.truncated:
            return self._words_end()
        if ending.open:
            return len(self.text)
        if not self.messages[-1].get("tool_calls") and text.endswith(ending.last):
            return len(text) - len(ending.last) + len(ending.marker)
        following = self._following()
        if following is None:
            rest = len(ending.last) - len(ending.marker) if text.endswith(ending.last) else 0
            return len(text) - rest
        place = self._shared(self.text, following)
        shared, rest_of = text[:place].rstrip(), text[place:]
        closing = rest_of.strip() in ("", ending.last[len(ending.marker) :].strip())
        if shared.endswith(ending.marker) or closing:
            return len(shared)
        if rest_of.startswith(ending.marker):
            return place + len(ending.marker)
        return len(text)

    def _words_end(self) -> int:
        """Return the end of the last turn's content, before anything that the template writes after it."""
        message = self.messages[-1]
        marked = {**message, "content": message["content"] + SENTINEL}
        _, found, after = self.render([*self.messages[:-1], marked], False).rpartition(SENTINEL)
        if not found or not self.text.endswith(after):
            raise RowError(UNCLEAR, code="template.turn-not-found")
        return len(self.text) - len(after)

    def _inner_end(self, turn: int, start: int) -> int:
        until = self._or_none(self.messages[: turn + 1])
        place = 0 if until is None else self._shared(until, self.text)
        if until and self.ending.opener and until.rstrip().endswith(self.ending.last):
            # The template opens another assistant turn, which may be the next turn.
            place = min(
                place, len(until.rstrip()) - len(self.ending.last) + len(self.ending.marker)
            )
        if until and place > start and self.ending.last.endswith(until[place:].rstrip()):
            return self._marked_end(until, place, self.text)
        end = self._end_before_next(turn) if turn + 1 < len(self.messages) else None
        return self._end_after_words(turn) if end is None else end

    def _marked_end(self, until: str, place: int, text: str) -> int:
        """Return the end of a turn whose content ends before `place` in `text`.

        Args:
            until: rendering in which the turn is the last one, with the same first `place` characters.
        """
        shared = until[:place].rstrip()
        if not self.ending.open:
            # A call may have its own end marker, with its result in the same turn.
            closed = shared.endswith(self.ending.marker) or self.controls.ends(shared)
            if closed or not until[place:].strip():
                return len(shared)
        end = self.controls.starts(text[place:])
        if not end:
            raise RowError(NO_END, code="template.no-end-marker")
        return place + end

    def _end_before_next(self, turn: int) -> int | None:
        """Return the end of a turn, found from the content of the next turn; None if that is not possible.

        The text between them must be the same as in a conversation that ends with the next turn.
        """
        current, following = (
            with_last_sentinel(self.messages[turn]),
            with_sentinel(self.messages[turn + 1]),
        )
        full = [*self.messages[: turn + 1], following, *self.messages[turn + 2 :]]
        try:
            pair = self.render([*self.messages[:turn], current, following], False).split(SENTINEL)
            before, found, _ = self.render(full, self.prompt).partition(SENTINEL)
        except RowError:
            return None
        if not (len(pair) == 3 and found and self.text.startswith(before)):
            return None
        end = self._end_in(pair[1], self._or_none([*self.messages[:turn], current]))
        between = pair[1][end:]
        return len(before) - len(between) if end and before.endswith(between) else None

    def _end_in(self, between: str, until: str | None) -> int:
        """Return the end of a turn in the text between its content and that of the next turn; 0 if not found.

        Args:
            until: rendering that ends with the turn, with SENTINEL as its last text; None if the template
                refuses it, for example a call without its result.
        """
        if until is None:
            place = -1 if self.ending.open else between.find(self.ending.marker)
            return place + len(self.ending.marker) if place >= 0 else 0
        _, found, until = until.rpartition(SENTINEL)
        place = self._shared(until, between)
        if not found or not self.ending.last.endswith(until[place:].rstrip()):
            return 0
        return self._marked_end(until, place, between)

    def _or_none(self, messages: list[Message]) -> str | None:
        try:
            return self.render(messages, False)
        except RowError:
            return None

    def _end_after_words(self, turn: int) -> int:
        marked = [*self.messages]
        if marked[turn].get("tool_calls"):
            raise RowError(UNCLEAR, code="template.turn-not-found")
        marked[turn] = with_sentinel(marked[turn])
        parts = self.render(marked, self.prompt).split(SENTINEL)
        if len(parts) != 2 or not self.text.endswith(parts[1]):
            raise RowError(UNCLEAR, code="template.turn-not-found")
        after, marker = parts[1], self.ending.marker
        place = len(self.text) - len(after)
        if self.ending.open or not after.startswith(marker):
            end = self.controls.starts(after)
            if not end:
                raise RowError(NO_END, code="template.no-end-marker")
            return place + end
        return place + len(marker)
