"""Render rows to text, and determine the trained characters.

A trained span is the text that the model generates: from the end of the generation prompt to the end marker
of the turn, including the marker but not the line break after it (found by `turns.py`).

Special-token text of the data is hidden while a template renders it (`rendered.py`), to distinguish it from
the template's own tokens; `encode.py` tokenizes it as text. Markers around an assistant's thinking are
tokens even so, since the model generates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.message_forms import (
    ThinkingForms,
    call_forms,
    find_thinking_forms,
    in_parts,
    with_thinking,
    writes_python,
)
from rpo_trainer.data.rendered import (
    Rendered,
    StandIns,
    longest_first,
    special_pattern,
    special_texts,
)
from rpo_trainer.data.rows import Message, RowError
from rpo_trainer.data.template_limits import CHARACTERS, TemplateLimit, time_limit
from rpo_trainer.data.templates import stop_clock
from rpo_trainer.data.thinking_marks import THOUGHT, Thoughts
from rpo_trainer.data.turn_endings import SENTINEL, USER, Controls, Ending, find_ending
from rpo_trainer.data.turns import Found, Span, TurnFinder
from rpo_trainer.errors import DataError
from rpo_trainer.recipe.template_kwargs import kwargs_key
from rpo_trainer.runtime.file_errors import UNREADABLE

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

Tools = list[Any] | None

MOST_RENDERERS = 256  # maximum number of cached renderers with different variables


def _is_control(token: AddedToken) -> bool:
    """Whether an added token is a marker of a template, not a word added to the vocabulary."""
    return bool(token.special or token.content.lstrip()[:1] in "<[]|{")


def trained_turns(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the assistant turns whose `weight` is not 0."""
    return [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0
    ]


@dataclass
class ChatRenderer:
    """Renders conversations with the chat template of `tokenizer`.

    Args:
        template_kwargs: variables of the template, such as `enable_thinking`; see `using` for those of a row.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _others: dict[tuple[str, bool], ChatRenderer] = field(init=False, default_factory=dict)
    _parts: bool | None = field(init=False, default=None)
    _stand_ins: StandIns = field(init=False)
    _controls: Controls = field(init=False)
    _thoughts: Thoughts = field(init=False)
    _endings: dict[bool, Ending] = field(init=False, default_factory=dict)
    _thinking: dict[bool, ThinkingForms] = field(init=False, default_factory=dict)
    _opened: dict[bool, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.values()
        names = longest_first({t.content for t in added if t.content.strip() and _is_control(t)})
        thoughts = tuple(name for name in names if THOUGHT.search(name))
        self._controls = Controls(tuple(names), thoughts)
        self._thoughts = Thoughts(self._controls, special_pattern(thoughts))
        self._stand_ins = StandIns(longest_first({*special_texts(self.tokenizer), *self._marks()}))

    def using(
        self, template_kwargs: Mapping[str, Any] | None, *, parsed: bool = False
    ) -> ChatRenderer:
        """Return a renderer with these variables instead of its own.

        Args:
            parsed: read special-token text in the variables as tokens, as in `conversation`.
        """
        key = kwargs_key(template_kwargs), parsed
        if key[0] == kwargs_key(self.template_kwargs):
            return self
        if key not in self._others:
            if len(self._others) >= MOST_RENDERERS:  # e.g. rows with different `documents`
                self._others.clear()
            other = ChatRenderer(self.tokenizer, dict(template_kwargs or {}))
            if (
                not parsed
            ):  # with its own names: the tokens of a template may depend on its variables
                other.template_kwargs = other._stand_ins.hide(other.template_kwargs)
            self._others[key] = other
        return self._others[key]

    def text(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Render a conversation. Raises RowError if the template refuses it."""
        return self._render(list(messages), tools)

    def _marks(self) -> list[str]:
        """Return added tokens that are not special, but that the template writes around turns.

        In the data they are read as text too.
        """
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if not t.special]
        if not added or not self.tokenizer.chat_template:
            return []
        try:
            ending = self.ending()
            prompt = self._render([{"role": "user", "content": SENTINEL}], None, True)
        except RowError:
            return []
        around = "\n".join(
            (ending.last, ending.between or "", ending.opening, *prompt.split(SENTINEL))
        )
        return [n for n in added if n.strip() and n in around and not THOUGHT.search(n)]

    def special_texts_in(self, text: str, *, assistant: bool = False) -> set[str]:
        """Return the special tokens, and others that the template writes, whose text is in `text`.

        Args:
            assistant: the text is the assistant's, in which thinking markers are tokens, not text.
        """
        if assistant:
            thought, text = self._thoughts.apart(text, opened=self.opens_thought())
            text = "\n".join(("".join(self._thoughts.split(thought)[::2]), text))
        return self._stand_ins.names_in(text)

    def thought_begins(self, before: str) -> int:
        """Return the start of the thinking markers at the end of the text before a turn."""
        return self._controls.thoughts_at_end(before)

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """Return the texts that the tokenizer reads as control tokens."""
        return frozenset(special_texts(self.tokenizer))

    def unread_keys(
        self, messages: Sequence[Message], tools: Tools, rendered: Rendered
    ) -> list[str]:
        """Return what the template does not render at all: `tools`, or keys of messages other than `content`.

        Args:
            rendered: result of `conversation` or `prompt`.
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
        text = self._render(messages, tools, last)
        found = []
        for key in sorted(keys):
            without = [{k: v for k, v in m.items() if k != key} for m in messages]
            if self._or_none(without, tools, last) == text:
                found.append(key)
        if tools and self._or_none(messages, None, last) == text:
            found.append("tools")
        return found

    def _or_none(self, messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        try:
            return self._render(messages, tools, prompt)
        except RowError:
            return None

    def as_read(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """Return the messages in the form that the template reads.

        Thinking is moved to a separate key if it would be rendered as part of the answer, and tool calls have
        the first form that is rendered as JSON.
        """
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
            user_turn: Message = {"role": "user", "content": "a"}
            self._thinking[key] = find_thinking_forms(
                lambda turn: self._or_none([user_turn, turn], tools, False),
                opened=self.opens_thought(tools),
            )
        return self._thinking[key]

    def opens_thought(self, tools: Tools = None) -> bool:
        """Whether the generation prompt ends with an opening thinking marker."""
        key = bool(tools)
        if key not in self._opened:
            messages: list[Message] = [{"role": "user", "content": "a"}]
            text = self._or_none(messages, tools, True) if self.tokenizer.chat_template else None
            self._opened[key] = self._thoughts.opened_by(text or "")
        return self._opened[key]

    def treats_as_thinking(self, written: str, content: Sequence[str]) -> bool:
        """Whether the template treats a part of the content as thinking.

        The content contains a closing thinking marker, and the generation prompt opens no thinking.
        """
        return not self.opens_thought() and self._thoughts.treated_as_thinking(written, content)

    def prompt(
        self, messages: Sequence[Message], tools: Tools = None, *, parsed: bool = False
    ) -> Rendered:
        """Render the conversation with the generation prompt, after which a response is sampled."""
        if parsed:
            text = self._render(self.as_read(list(messages), tools), tools, True)
            return Rendered(text, (), parsed=True)
        hidden, tools = self._hidden(messages), self._stand_ins.hide(tools)
        text = self._render(self.as_read(hidden, tools), tools, generation_prompt=True)
        return self._stand_ins.show(Found(text, []))

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        last_only: bool = False,
        parsed: bool = False,
        truncated: bool = False,
    ) -> Rendered:
        """Render a conversation, with all assistant turns trained or only the last.

        Args:
            truncated: the last turn is a truncated response: omit what the template writes after its content.
            parsed: read special-token text in the messages as tokens. An end marker at the end of a turn is
                not repeated.

        Raises:
            RowError: the template refuses the conversation, writes no end marker, or rewrites the turns so
                that they cannot be found.
            DataError: there is no chat template.
        """
        if parsed:
            hidden = [self._without_end(message, tools) for message in messages]
        else:
            hidden, tools = self._hidden(messages), self._stand_ins.hide(tools)
        hidden = self.as_read(hidden, tools)
        turns = trained_turns(hidden)
        finder = TurnFinder(
            lambda messages, prompt: self._render(messages, tools, prompt),
            hidden,
            self._controls,
            self.ending(tools),
            self.opens_turn,
            truncated=truncated,
        )
        found = finder.found(turns[-1:] if last_only else turns)
        if parsed:
            shown = Rendered(found.text, tuple(found.spans), parsed=True, differs=found.differs)
        else:
            shown = self._stand_ins.show(found)
        return replace(shown, truncated=truncated)

    def _without_end(self, message: Message, tools: Tools) -> Message:
        """Remove an end marker from the end of a message's content."""
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
                "the rows are messages, but the tokenizer has no chat template",
                code="template.missing",
                where="model.chat_template",
                fix="set `chat_template` to chatml, plain or the path of a Jinja template",
            )
        try:
            with time_limit():
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
            reason = str(error) or type(error).__name__
            raise RowError(
                f"the chat template rejects the row ({reason})", code="template.refuses-row"
            ) from None
        return str(text)

    def _shaped(self, message: Message) -> Message:
        """Return the message in the form that is passed to the template."""
        message = with_thinking(message)
        if self._parts is None:
            self._detect_parts()
        return in_parts(message) if self._parts else message

    def _detect_parts(self) -> None:
        """Determine whether the template only renders content in parts, as some multimodal templates do."""
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
        """Return what the template writes after an assistant turn, which may depend on tools."""
        key = bool(tools)
        if key not in self._endings:
            self._endings[key] = find_ending(
                lambda messages, prompt: self._render(messages, tools, prompt), self._controls
            )
        return self._endings[key]

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        """Hide special-token text in the messages, except for markers around the assistant's thinking."""
        return [
            self._hide_assistant(message)
            if message["role"] == "assistant"
            else self._stand_ins.hide(message)
            for message in messages
        ]

    def _hide_assistant(self, message: Message) -> Message:
        thought, content = self._thoughts.apart(message["content"], opened=self.opens_thought())
        hidden: Message = self._stand_ins.hide({**message, "content": content})
        parts = self._thoughts.split(thought)
        marks = [
            part if number % 2 else self._stand_ins.hide(part) for number, part in enumerate(parts)
        ]
        return {**hidden, "content": "".join(marks) + hidden["content"]}


def mask_of(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return 1 for each token that overlaps a span; a token without characters counts as one character."""
    import numpy as np

    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts = places[:, 0]
    stops = np.maximum(places[:, 1], starts + 1)
    mask = np.zeros(len(places), dtype=bool)
    for start, end in spans:
        mask |= (starts < end) & (stops > start)
    trained: list[int] = mask.astype(int).tolist()
    return trained
