"""Rows as text, and exactly which characters of it are trained.

A trained span is what the model has to write itself: from the end of the generation prompt to the end
marker of the turn, with the marker and without the line break after it (`turns.py` finds both).

Text of special tokens inside the data is replaced by private-use characters while rendering, so
that what the template wrote and what the data holds stay apart; `encode.py` makes text of it again.
The marks around the thinking of an assistant's turn are control even so: a model writes them itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.bounds import CHARACTERS, TemplateLimit, limited
from rpo_trainer.data.endings import SENTINEL, USER, Controls, Ending, learn_ending
from rpo_trainer.data.rows import Message, RowError
from rpo_trainer.data.spellings import (
    ThinkingForms,
    call_forms,
    in_parts,
    learn_thinking,
    with_thinking,
    writes_python,
)
from rpo_trainer.data.templates import set_chat_template, stop_clock
from rpo_trainer.data.thinking import THOUGHT, Thoughts
from rpo_trainer.data.turns import Found, Span, TurnFinder
from rpo_trainer.errors import DataError
from rpo_trainer.recipe.template_kwargs import kwargs_key
from rpo_trainer.runtime.file_errors import UNREADABLE

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "Rendered", "set_chat_template"]

Tools = list[Any] | None

MOST_RENDERERS = 256  # with variables of their own, kept at once
PRIVATE = 0xF0000  # a plane of characters that no text uses


@dataclass(frozen=True)
class Rendered:
    """A text to tokenise.

    Attributes:
        spans: trained character ranges of `text`, ascending.
        literal: character ranges of special-token text that came with the data.
        plain: no chat template; nothing in it is control, and the end token follows it.
        cut: the response was cut before it ended: the text ends with its words, and no end token follows.
        parsed: text of special tokens that came with the data is control all the same.
        differs: what generation and training have around their first difference in front of a trained
            turn; None: the turn stands behind its generation prompt.
    """

    text: str
    spans: tuple[Span, ...]
    literal: tuple[Span, ...] = ()
    plain: bool = False
    cut: bool = False
    parsed: bool = False
    differs: tuple[str, str] | None = None


def render_plain(
    prompt: str, response: str, *, parsed: bool = False, cut: bool = False
) -> Rendered:
    """Prompt and response joined as they are; `cut`: the response has no end token."""
    text = prompt + response
    return Rendered(text, ((len(prompt), len(text)),), plain=True, cut=cut, parsed=parsed)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer turns into control tokens, longest first."""
    texts = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content}
    return _longest_first(texts)


def _longest_first(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: (-len(text), text))


def special_pattern(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the texts of control tokens; None where there are none."""
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _is_control(token: AddedToken) -> bool:
    """Whether an added token is one of a template's, not a word that a vocabulary was extended by."""
    return bool(token.special or token.content.lstrip()[:1] in "<[]|{")


def trained_turns(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns, without those that the data gives the weight 0."""
    return [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0
    ]


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
    _parts: bool | None = field(init=False, default=None)
    _special: re.Pattern[str] | None = field(init=False)
    _names: list[str] = field(init=False)
    _stand_in: re.Pattern[str] = field(init=False)
    _reserved: re.Pattern[str] = field(init=False)
    _controls: Controls = field(init=False)
    _thoughts: Thoughts = field(init=False)
    _endings: dict[bool, Ending] = field(init=False, default_factory=dict)
    _thinking: dict[bool, ThinkingForms] = field(init=False, default_factory=dict)
    _opened: dict[bool, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.values()
        names = _longest_first({t.content for t in added if t.content.strip() and _is_control(t)})
        thoughts = tuple(name for name in names if THOUGHT.search(name))
        self._controls = Controls(tuple(names), thoughts)
        self._thoughts = Thoughts(self._controls, special_pattern(thoughts))
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
            ending = self.ending()
            asked = self._render([{"role": "user", "content": SENTINEL}], None, True)
        except RowError:
            return []
        around = "\n".join(
            (ending.last, ending.between or "", ending.opening, *asked.split(SENTINEL))
        )
        return [n for n in added if n.strip() and n in around and not THOUGHT.search(n)]

    def special_texts_in(self, text: str, *, said: bool = False) -> set[str]:
        """The special tokens, and others that the template writes, whose text is in `text`.

        Args:
            said: the assistant's: the marks around its thinking are control, not text.
        """
        if self._special is None:
            return set()
        if said:
            thought, text = self._thoughts.apart(text, opened=self.opens_thought())
            text = "\n".join(("".join(self._thoughts.split(thought)[::2]), text))
        return set(self._special.findall(text))

    def thought_begins(self, before: str) -> int:
        """Where the marks of thinking begin that the text in front of a turn ends with."""
        return self._controls.thoughts_at_end(before)

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
        messages = self.as_read(list(messages), tools)
        whole = self._render(messages, tools, last)
        found = []
        for key in sorted(keys):
            without = [{k: v for k, v in m.items() if k != key} for m in messages]
            if self._or_none(without, tools, last) == whole:
                found.append(key)
        if tools and self._or_none(messages, None, last) == whole:
            found.append("tools")
        return found

    def _or_none(self, messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        try:
            return self._render(messages, tools, prompt)
        except RowError:
            return None

    def as_read(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """The messages in the spelling that the template reads: thinking in a key of its own where it
        would be written as a part of the answer, tool calls in the first form that it writes as JSON."""
        messages = [*map(self._thinking_forms(tools).apart, messages)]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        last = messages[-1]["role"] != "assistant"
        for form in call_forms(messages):
            text = self._or_none(form, tools, last)
            if text is not None and not writes_python(form, text):
                return form
        return messages

    def _thinking_forms(self, tools: Tools) -> ThinkingForms:
        key = bool(tools)
        if key not in self._thinking:
            asked: Message = {"role": "user", "content": "a"}
            self._thinking[key] = learn_thinking(
                lambda turn: self._or_none([asked, turn], tools, False),
                opened=self.opens_thought(tools),
            )
        return self._thinking[key]

    def opens_thought(self, tools: Tools = None) -> bool:
        """Whether the generation prompt ends with a mark that opens the thinking."""
        key = bool(tools)
        if key not in self._opened:
            asked: list[Message] = [{"role": "user", "content": "a"}]
            text = self._or_none(asked, tools, True) if self.tokenizer.chat_template else None
            self._opened[key] = self._thoughts.opened_by(text or "")
        return self._opened[key]

    def takes_for_thinking(self, written: str, content: Sequence[str]) -> bool:
        """Whether the template has made thinking of a part of these words of a turn, which mention a mark
        that closes it, although generation opens none."""
        return not self.opens_thought() and self._thoughts.cut(written, content)

    def prompt(
        self, messages: Sequence[Message], tools: Tools = None, *, parsed: bool = False
    ) -> Rendered:
        """The text a response is sampled after: the conversation and the generation prompt."""
        if parsed:
            text = self._render(self.as_read(list(messages), tools), tools, True)
            return Rendered(text, (), parsed=True)
        hidden, tools = self._hidden(messages), self._hide(tools)
        text = self._render(self.as_read(hidden, tools), tools, generation_prompt=True)
        return self._show(Found(text, []))

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        last_only: bool = False,
        parsed: bool = False,
        cut: bool = False,
    ) -> Rendered:
        """The whole conversation, every assistant turn trained, or only the last.

        Args:
            cut: the last turn is a response that was cut before it ended: what the template writes after
                its words is left out.
            parsed: text of special tokens in the messages is control, as what the template writes; an
                end marker that a turn brings is not written twice.

        Raises:
            RowError: the template refuses the conversation, writes no end marker, or rewrites the
                turns so that no way finds them.
            DataError: there is no chat template.
        """
        if parsed:
            hidden = [self._without_end(message, tools) for message in messages]
        else:
            hidden, tools = self._hidden(messages), self._hide(tools)
        hidden = self.as_read(hidden, tools)
        turns = trained_turns(hidden)
        finder = TurnFinder(
            lambda talk, prompt: self._render(talk, tools, prompt),
            hidden,
            self._controls,
            self.ending(tools),
            self.opens_turn,
            cut=cut,
        )
        found = finder.found(turns[-1:] if last_only else turns)
        if parsed:
            shown = Rendered(found.text, tuple(found.spans), parsed=True, differs=found.differs)
        else:
            shown = self._show(found)
        return replace(shown, cut=cut)

    def _without_end(self, message: Message, tools: Tools) -> Message:
        """The message without an end marker at the end of its content."""
        if message["role"] != "assistant":
            return message
        ending = self.ending(tools)
        marker = (ending.between or "" if ending.open else ending.marker).strip()
        marker = marker[: self._controls.starts(marker) or len(marker)] if ending.open else marker
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
                code="template.missing",
                where="model.chat_template",
                why="how a model is shown its turns is its own, and cannot be guessed",
                fix="chat_template: chatml | plain | the path of a Jinja template",
            )
        try:
            with limited():
                text = self.tokenizer.apply_chat_template(
                    [self._shaped(message) for message in messages],
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
            raise RowError(
                f"the chat template refuses the row ({said})", code="template.refuses-row"
            ) from None
        return str(text)

    def _shaped(self, message: Message) -> Message:
        """The message as it is handed to the template."""
        message = with_thinking(message)
        if self._parts is None:
            self._learn_parts()
        return in_parts(message) if self._parts else message

    def _learn_parts(self) -> None:
        """Whether the template takes content as a list of parts only, as those of some models of images
        do: it refuses a text or does not write it, and writes the text of a part."""
        probe: list[Message] = [USER, {"role": "assistant", "content": SENTINEL}]
        for self._parts in (False, True):
            if SENTINEL in (self._or_none(probe, None, False) or ""):
                return
        self._parts = False

    @cached_property
    def opens_turn(self) -> bool:
        """Whether the template writes anything for `add_generation_prompt`."""
        probe: list[Message] = [{"role": "user", "content": "a"}]
        return self._render(probe, None, True) != self._render(probe, None)

    def ending(self, tools: Tools = None) -> Ending:
        """What the template writes after an assistant turn; with tools it may be another template."""
        key = bool(tools)
        if key not in self._endings:
            self._endings[key] = learn_ending(
                lambda talk, prompt: self._render(talk, tools, prompt), self._controls
            )
        return self._endings[key]

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the text of special tokens hidden, but for the marks around the
        assistant's thinking."""
        return [
            self._hide_said(message) if message["role"] == "assistant" else self._hide(message)
            for message in messages
        ]

    def _hide_said(self, message: Message) -> Message:
        thought, said = self._thoughts.apart(message["content"], opened=self.opens_thought())
        hidden: Message = self._hide({**message, "content": said})
        parts = self._thoughts.split(thought)
        marks = [part if number % 2 else self._hide(part) for number, part in enumerate(parts)]
        return {**hidden, "content": "".join(marks) + hidden["content"]}

    def _hide(self, value: Any) -> Any:
        """`value` with the text of special tokens replaced by private-use characters."""
        if isinstance(value, str):
            if not value.isascii() and self._reserved.search(value):
                raise RowError(
                    "the text holds private-use characters that are needed here",
                    code="data.private-use-characters",
                )
            if self._special is None:
                return value
            return self._special.sub(lambda m: chr(PRIVATE + self._names.index(m[0])), value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

    def _show(self, found: Found) -> Rendered:
        """The special-token texts put back, with the spans moved to fit."""
        text, spans = found.text, found.spans
        pieces, literal, moves, length, done = [], [], [(0, 0)], 0, 0
        for match in self._stand_in.finditer(text):
            name = self._names[ord(match[0]) - PRIVATE]
            pieces += [text[done : match.start()], name]
            length += match.start() - done
            literal.append((length, length + len(name)))
            length, done = length + len(name), match.end()
            moves.append((done, length - done))
        if not literal:
            return Rendered(text, tuple(spans), differs=found.differs)

        def moved(place: int) -> int:
            return place + next(by for start, by in reversed(moves) if start <= place)

        text = "".join([*pieces, text[done:]])
        shown = tuple((moved(a), moved(b)) for a, b in spans)
        differs = found.differs and (self._named(found.differs[0]), self._named(found.differs[1]))
        return Rendered(text, shown, tuple(literal), differs=differs)

    def _named(self, text: str) -> str:
        return self._stand_in.sub(lambda match: self._names[ord(match[0]) - PRIVATE], text)
