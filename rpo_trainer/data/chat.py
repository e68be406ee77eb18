"""Rows as text, and exactly which characters of it are trained.

A trained span is what the model has to write itself: from the end of the generation prompt to the end
marker of the turn, with the marker and without the line break after it. Two ways find it:

1. Prefixes. The conversation up to a turn, rendered alone with the generation prompt, is the
   beginning of the whole; where it ends the turn begins. Rendered with the turn, it ends the turn.
2. Sentinels, where a template renders a turn differently once others follow (it drops thinking,
   say): the turn's content is replaced by a mark, and the mark is looked for.

Text of special tokens inside the data is replaced by private-use characters while rendering, so
that what the template wrote and what the data holds stay apart; `encode.py` makes text of it again.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.bounds import CHARACTERS, TemplateLimit, limited
from rpo_trainer.data.rows import THINKING, Message, RowError
from rpo_trainer.data.templates import set_chat_template
from rpo_trainer.errors import DataError
from rpo_trainer.foreign import UNREADABLE
from rpo_trainer.template_kwargs import kwargs_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "Rendered", "set_chat_template"]

Span = tuple[int, int]
Tools = list[Any] | None

SENTINEL = "\ue00frpo\ue00e"
MOST_RENDERERS = 256  # with variables of their own, kept at once
PRIVATE = 0xF0000  # a plane of characters that no text uses
# The date that the first templates with a clock write where there is none.
DATE = datetime.datetime(2024, 7, 26)
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.+?)\1\s*\)")
NO_END = "the chat template writes no end marker after the assistant's turn"
UNCLEAR = "the chat template rewrites the conversation so that the assistant's turn cannot be found"


@dataclass(frozen=True)
class Rendered:
    """A text to tokenise.

    Attributes:
        spans: trained character ranges of `text`, ascending.
        literal: character ranges of special-token text that came with the data.
        plain: no chat template; nothing in it is control, and the end token follows it.
        parsed: text of special tokens that came with the data is control all the same.
    """

    text: str
    spans: tuple[Span, ...]
    literal: tuple[Span, ...] = ()
    plain: bool = False
    parsed: bool = False


def render_plain(prompt: str, response: str, *, parsed: bool = False) -> Rendered:
    """Prompt and response joined as they are."""
    text = prompt + response
    return Rendered(text, ((len(prompt), len(text)),), plain=True, parsed=parsed)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer turns into control tokens, longest first."""
    texts = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content}
    return _longest_first(texts)


def _longest_first(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))


def special_pattern(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the texts of control tokens; None where there are none."""
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _with_thinking(message: Message) -> Message:
    """The message with its thinking under every name that templates know, as newer transformers do."""
    thought = next((message[key] for key in THINKING if message.get(key)), None)
    return message if thought is None else {**message, **dict.fromkeys(THINKING, thought)}


def trained_turns(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns, without those that the data gives the weight 0."""
    return [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0
    ]


def stop_clock(template: str) -> str:
    """`template` with a clock that stands still.

    Otherwise tomorrow's tokens, and with them the reference log-probs, would be others.
    """
    template = CLOCK.sub(lambda match: repr(DATE.strftime(match[2])), template)
    if "strftime_now(" not in template:
        return template
    # The form comes from elsewhere: a macro of the same name, which is slower.
    parts = "".join(f".replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "AaBbdeHIjMmpSYy")
    clock = "{%- macro strftime_now(form) -%}{{ form" + parts + " }}{%- endmacro -%}"
    return clock + template


@dataclass
class ChatRenderer:
    """Renders conversations by the chat template of `tokenizer`.

    Args:
        template_kwargs: variables that the template gets beside the conversation (`enable_thinking`);
            see `using` for those of a row.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _others: dict[tuple[str, bool], ChatRenderer] = field(init=False, default_factory=dict)
    _special: re.Pattern[str] | None = field(init=False)
    _names: list[str] = field(init=False)
    _stand_in: re.Pattern[str] = field(init=False)
    _reserved: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = _longest_first({*special_texts(self.tokenizer), *self._marks()})
        self._special = special_pattern(self._names)
        last = chr(PRIVATE + max(len(self._names) - 1, 0))
        self._stand_in = re.compile(f"[{chr(PRIVATE)}-{last}]")
        self._reserved = re.compile(f"{self._stand_in.pattern}|{SENTINEL}")

    def using(
        self, template_kwargs: Mapping[str, Any] | None, *, parsed: bool = False
    ) -> ChatRenderer:
        """The renderer with these variables in place of its own.

        Args:
            parsed: text of special tokens in them is control, as in `conversation`.
        """
        key = kwargs_key(template_kwargs), parsed
        if key[0] == kwargs_key(self.template_kwargs):
            return self
        if key not in self._others:
            if (
                len(self._others) >= MOST_RENDERERS
            ):  # rows with documents have variables of their own
                self._others.clear()
            other = ChatRenderer(self.tokenizer, dict(template_kwargs or {}))
            if not parsed:  # by its own names: with other variables a template writes other tokens
                other.template_kwargs = other._hide(other.template_kwargs)
            self._others[key] = other
        return self._others[key]

    def text(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """What the template writes for a conversation. Raises RowError where it refuses it."""
        return self._render(list(messages), tools)

    def _marks(self) -> list[str]:
        """Tokens that the template writes around turns although the tokenizer does not call them
        special: in the data they are text as well."""
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if not t.special]
        if not added or not self.tokenizer.chat_template:
            return []
        try:
            text = self._render([{"role": "user", "content": "a"}], None) + self.ending[0]
        except RowError:
            return []
        return [name for name in added if name.strip() and name in text and name != "a"]

    def special_texts_in(self, text: str) -> set[str]:
        """The special tokens, and others that the template writes, whose text is in `text`."""
        return set() if self._special is None else set(self._special.findall(text))

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The texts that the tokenizer turns into control tokens."""
        return frozenset(special_texts(self.tokenizer))

    def unread_keys(
        self, messages: Sequence[Message], tools: Tools, rendered: Rendered
    ) -> list[str]:
        """What the template does not write at all: `tools`, or keys of messages beside their content.

        Args:
            rendered: the conversation as `conversation` or `prompt` gives it.
        """
        keys = {
            key
            for message in messages
            for key, value in message.items()
            if value and key not in ("role", "content", "tool_calls")
            if key != "weight" or message["role"] != "assistant"
        }
        if not keys and not tools:
            return []
        last = messages[-1]["role"] != "assistant"
        whole = self._render(list(messages), tools, last)
        found = []
        for key in sorted(keys):
            without = [{k: v for k, v in m.items() if k != key} for m in messages]
            if self._or_none(without, tools, last) == whole:
                found.append(key)
        if tools and self._or_none(list(messages), None, last) == whole:
            found.append("tools")
        return found

    def _or_none(self, messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        try:
            return self._render(messages, tools, prompt)
        except RowError:
            return None

    def prompt(
        self, messages: Sequence[Message], tools: Tools = None, *, parsed: bool = False
    ) -> Rendered:
        """The text a response is sampled after: the conversation and the generation prompt."""
        if parsed:
            return Rendered(self._render(list(messages), tools, True), (), parsed=True)
        text = self._render(self._hide(messages), self._hide(tools), generation_prompt=True)
        return self._show(text, [])

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        last_only: bool = False,
        parsed: bool = False,
    ) -> Rendered:
        """The whole conversation, every assistant turn trained, or only the last.

        Args:
            parsed: text of special tokens in the messages is control, as what the template writes; an
                end marker that a turn brings is not written twice.

        Raises:
            RowError: the template refuses the conversation, writes no end marker, or rewrites the
                turns so that neither way finds them.
            DataError: there is no chat template.
        """
        if parsed:
            hidden = [self._without_end(message) for message in messages]
        else:
            hidden, tools = self._hide(messages), self._hide(tools)
        turns = trained_turns(hidden)
        full = self._render(hidden, tools)
        finder = _TurnFinder(self, hidden, tools, full)
        spans = [finder.span(turn) for turn in (turns[-1:] if last_only else turns)]
        return Rendered(full, tuple(spans), parsed=True) if parsed else self._show(full, spans)

    def _without_end(self, message: Message) -> Message:
        """The message without an end marker at the end of its content."""
        if message["role"] != "assistant":
            return message
        marker = self.ending[0][: self.ending[1]].strip()
        content = message["content"]
        for end in (marker, self.tokenizer.eos_token):
            if end and content.rstrip().endswith(end):
                content = content.rstrip().removesuffix(end)
        return {**message, "content": content}

    def _render(
        self, messages: list[Message], tools: Tools, generation_prompt: bool = False
    ) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise DataError(
                "the rows are messages, and the tokenizer has no chat template",
                where="model.chat_template",
                why="how a model is shown its turns is its own, and cannot be guessed",
                fix="chat_template: chatml | plain | the path of a Jinja template",
            )
        try:
            with limited():
                text = self.tokenizer.apply_chat_template(
                    [_with_thinking(message) for message in messages],
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.template_kwargs,
                    chat_template=stop_clock(self.tokenizer.get_chat_template(None, tools)),
                )
            if len(text) > CHARACTERS:
                raise TemplateLimit(f"it writes {len(text)} characters")
        except (jinja2.TemplateError, TemplateLimit, MemoryError, *UNREADABLE) as error:
            said = str(error) or type(error).__name__
            raise RowError(f"the chat template refuses the row ({said})") from None
        return str(text)

    @cached_property
    def opens_turn(self) -> bool:
        """Whether the template writes anything for `add_generation_prompt`."""
        probe: list[Message] = [{"role": "user", "content": "a"}]
        return self._render(probe, None, True) != self._render(probe, None)

    @cached_property
    def ending(self) -> tuple[str, int]:
        """What the template writes after an assistant turn that is the last, and how many characters
        of it are the end marker: some end the whole conversation too (`<|end|>`, `<|endoftext|>`).
        """
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        text = self._render(probe, None).rpartition(SENTINEL)[2].rstrip()
        return text, self._control_end(text) or len(text)

    def _control_end(self, text: str) -> int:
        """Where the control token ends that `text` begins with, after blanks; 0 for none."""
        blank = len(text) - len(text.lstrip())
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        found = [name for name in tokens if name and text.startswith(name, blank)]
        return blank + len(max(found, key=len)) if found else 0

    def _hide(self, value: Any) -> Any:
        """`value` with the text of special tokens replaced by private-use characters."""
        if isinstance(value, str):
            if not value.isascii() and self._reserved.search(value):
                raise RowError("the text holds private-use characters that are needed here")
            if self._special is None:
                return value
            return self._special.sub(lambda m: chr(PRIVATE + self._names.index(m[0])), value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

    def _show(self, text: str, spans: list[Span]) -> Rendered:
        """The special-token texts put back, with the spans moved to fit."""
        pieces, literal, moves, length, done = [], [], [(0, 0)], 0, 0
        for match in self._stand_in.finditer(text):
            name = self._names[ord(match[0]) - PRIVATE]
            pieces += [text[done : match.start()], name]
            length += match.start() - done
            literal.append((length, length + len(name)))
            length, done = length + len(name), match.end()
            moves.append((done, length - done))
        if not literal:
            return Rendered(text, tuple(spans))

        def moved(place: int) -> int:
            return place + next(by for start, by in reversed(moves) if start <= place)

        text = "".join([*pieces, text[done:]])
        return Rendered(text, tuple((moved(a), moved(b)) for a, b in spans), tuple(literal))


@dataclass
class _TurnFinder:
    """Finds the assistant turns of one rendered conversation."""

    renderer: ChatRenderer
    messages: list[Message]
    tools: Tools
    full: str

    def span(self, turn: int) -> Span:
        start, end = self._start(turn), self._end(turn)
        if start >= end:
            raise RowError(UNCLEAR)
        return start, end

    def _start(self, turn: int) -> int:
        prompt = self.renderer._render(self.messages[:turn], self.tools, True) if turn else ""
        begins = self.full.startswith(prompt) and turn > 0
        if begins and self.renderer.opens_turn:
            return len(prompt)
        before, _ = self._around(turn)
        if not self.full.startswith(before):
            raise RowError(UNCLEAR)
        return len(before) - len(self._lead(turn, prompt, before))

    def _lead(self, turn: int, prompt: str, before: str) -> str:
        """What the model is to write between the prompt and the turn's own words.

        Without a generation prompt that is the blank in front of the words, not a heading: that is
        the template's.
        """
        if not turn:
            return ""
        alone, _ = self._until(turn)._around(turn)
        lead = alone[len(prompt) :] if alone.startswith(prompt) else ""
        own = self.renderer.opens_turn or not lead.strip()
        return lead if own and before.endswith(lead) else ""

    def _end(self, turn: int) -> int:
        ending, marker = self.renderer.ending
        if not ending:
            raise RowError(NO_END)
        if turn == len(self.messages) - 1:
            text = self.full.rstrip()
            return len(text) - (len(ending) - marker if text.endswith(ending) else 0)
        until = self.renderer._render(self.messages[: turn + 1], self.tools)
        if self.full.startswith(until):
            return len(until.rstrip())
        _, behind = self._around(turn)
        if not self.full.endswith(behind):
            raise RowError(UNCLEAR)
        return len(self.full) - len(behind) + self._marker(turn, behind)

    def _until(self, turn: int) -> _TurnFinder:
        """The conversation that ends with this turn."""
        return _TurnFinder(self.renderer, self.messages[: turn + 1], self.tools, "")

    def _around(self, turn: int) -> tuple[str, str]:
        """What the template writes before and after the content of a turn."""
        marked = [*self.messages]
        marked[turn] = {**marked[turn], "content": SENTINEL}
        parts = self.renderer._render(marked, self.tools).split(SENTINEL)
        if len(parts) != 2 or SENTINEL in self.full:
            raise RowError(UNCLEAR)
        return parts[0], parts[1]

    def _marker(self, turn: int, behind: str) -> int:
        """Characters of the end marker at the beginning of what follows a turn's content."""
        if end := self.renderer._control_end(behind):
            return end
        # The marker is words: it is what follows the turn when nothing follows.
        _, marker = self._until(turn)._around(turn)
        if not marker.strip() or not behind.startswith(marker.rstrip()):
            raise RowError(NO_END)
        return len(marker.rstrip())
