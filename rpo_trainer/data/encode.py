"""Rendered texts → token ids and masks. Special-token text of the data stays plain text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.rendered import Rendered, special_pattern, special_texts
from rpo_trainer.data.rows import Message, RowError
from rpo_trainer.data.trained_spans import ChatRenderer, mask_of
from rpo_trainer.data.turns import Span
from rpo_trainer.errors import ModelError

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

Encoded = tuple[list[int], list[int]]  # ids and mask (1 = trained), equally long
_Piece = tuple[list[int], list[Span]]  # ids and their character ranges


@dataclass
class Encoder:
    """Tokenizes rendered texts with a fast tokenizer.

    Raises:
        ModelError: the tokenizer has no character offsets.
    """

    tokenizer: PreTrainedTokenizerBase
    begin: list[int] = field(init=False)
    _special: re.Pattern[str] | None = field(init=False)
    _greedy: dict[int, AddedToken] = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ModelError(
                "the tokenizer is slow and has no character offsets",
                code="tokenizer.no-offsets",
                why="response masks are computed from the offsets",
                fix="use the model's fast tokenizer (tokenizer.json)",
            )
        self._special = special_pattern(special_texts(self.tokenizer))
        # Control tokens that absorb adjacent white space.
        added = self.tokenizer.added_tokens_decoder
        self._greedy = {i: t for i, t in added.items() if t.special and (t.rstrip or t.lstrip)}
        # The BOS token, if the tokenizer prepends it to every text.
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a")["input_ids"][:1]
        self.begin = [bos] if bos is not None and list(first) == [bos] else []

    def end(self) -> int:
        """Return the id of the EOS token. Raises ModelError if there is none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token",
                code="tokenizer.no-end-token",
                why="a model trained without it never ends a response",
                fix="set `eos_token` in tokenizer_config.json",
            )
        return int(self.tokenizer.eos_token_id)

    def encode(
        self, texts: Sequence[Rendered], apart: Sequence[bool] | None = None
    ) -> list[Encoded]:
        """Return ids and masks. A token is trained if it overlaps a trained span.

        Args:
            apart: texts to tokenize piece by piece (see `_in_pieces`), in addition to those that require it;
                either all responses to a prompt must be tokenized so, or none.
        """
        flags = [bool(t.literal) or bool(apart and apart[i]) for i, t in enumerate(texts)]
        at_once = [text for text, flag in zip(texts, flags, strict=True) if not flag]
        letters = iter(self._batch([t.text for t in at_once if _as_letters(t)], literal=True))
        control = iter(self._batch([t.text for t in at_once if not _as_letters(t)], literal=False))
        encoded = []
        for text, flag in zip(texts, flags, strict=True):
            piece = (
                self._in_pieces(text) if flag else next(letters if _as_letters(text) else control)
            )
            encoded.append(self._finished(text, *piece))
        return encoded

    def _finished(self, text: Rendered, ids: list[int], offsets: list[Span]) -> Encoded:
        if not text.plain:
            ids, offsets = self._cut_blanks(text, ids, offsets)
        mask = mask_of(self._own_text(text.text, ids, offsets), text.spans)
        if text.plain and text.parsed and (ended := self._ended(ids, text.text, offsets)):
            ended -= int(text.truncated)
            ids, mask = ids[:ended], mask[:ended]
        elif text.plain and not text.truncated:
            ids, mask = [*ids, self.end()], [*mask, int(bool(text.spans))]
        if begin := self._begin_of(text):
            ids, mask = [*begin, *ids], [0, *mask]
        return ids, mask

    def prompt_ids(self, text: Rendered) -> list[int]:
        """Return the ids of a text that has no trained spans and is not `plain`, as `encode` does.

        Without masks, the character offsets are needed for special-token text of the data only.
        """
        if text.literal:
            return self.encode([text])[0][0]
        return [*self._begin_of(text), *self.text_ids(text.text, literal=False)]

    def text_ids(self, text: str, *, literal: bool) -> list[int]:
        """Return the ids of a text alone.

        Args:
            literal: read the text of control tokens as text.
        """
        found = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=literal,
            verbose=False,
        )
        ids: list[int] = found["input_ids"]
        return ids

    def _begin_of(self, text: Rendered) -> list[int]:
        """Return the BOS token if the tokenizer prepends it and the text does not begin with it."""
        if not self.begin:
            return []
        bos = self.tokenizer.bos_token
        written = not _as_letters(text) and bos is not None and text.text.startswith(bos)
        by_data = bool(text.literal) and text.literal[0][0] == 0
        return self.begin if by_data or not written else []

    def _cut_blanks(
        self, text: Rendered, ids: list[int], offsets: list[Span]
    ) -> tuple[list[int], list[Span]]:
        """Split white-space tokens at the beginning of a trained span.

        A generation prompt may end with a line break (`<think>\n`) and the turn begin with another one. In
        generation the first line break is a separate token, so that it must be one in training too.
        """
        for start, _ in reversed(text.spans):
            place = bisect_left(offsets, (start, 0)) - 1
            begin, end = offsets[place] if place >= 0 else (start, start)
            if not begin < start < end or not text.text[begin:end].isspace():
                continue
            pieces = self._batch([text.text[begin:start], text.text[start:end]], literal=False)
            found = [token for part, _ in pieces for token in part]
            if self.tokenizer.decode(found) == self.tokenizer.decode([ids[place]]):
                moved = [
                    (a + by, b + by)
                    for (_, part), by in zip(pieces, (begin, start), strict=True)
                    for a, b in part
                ]
                ids = [*ids[:place], *found, *ids[place + 1 :]]
                offsets = [*offsets[:place], *moved, *offsets[place + 1 :]]
        return ids, offsets

    def _ended(self, ids: list[int], text: str, offsets: list[Span]) -> int:
        """Return the number of tokens up to an end token at the end of the text; 0 if there is none.

        White space may follow the end token.
        """
        last = len(ids)
        while last and not text[slice(*offsets[last - 1])].strip():
            last -= 1
        return last if last and ids[last - 1] in self._ends else 0

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(end_token_ids(self.tokenizer))

    def _own_text(self, text: str, ids: list[int], offsets: list[Span]) -> list[Span]:
        """Narrow the ranges of control tokens to their own text.

        A control token that absorbs the white space after it would otherwise be trained whenever a response
        begins with white space.
        """
        if not self._greedy:
            return offsets
        found = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            name = self._greedy[token].content if token in self._greedy else ""
            place = text.find(name, start, end) if name else -1
            found.append((start, end) if place < 0 else (place, place + len(name)))
        return found

    def _batch(self, texts: list[str], *, literal: bool) -> list[_Piece]:
        if not texts:
            return []
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=literal,
            verbose=False,
        )
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _in_pieces(self, text: Rendered) -> _Piece:
        """Tokenize the stretches of text between the template's control tokens separately.

        A tokenizer first splits a text at its control tokens, so the ids are those of the entire text, except
        that text of the data is never read as a control token. (A tokenizer that marks only the first word of
        a text marks the first word of each stretch.)
        """
        if text.plain or text.parsed:
            return self._batch([text.text], literal=not text.parsed)[0]
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end, control in self._stretches(text):
            found, places = self._batch([text.text[start:end]], literal=not control)[0]
            ids += found
            offsets += [(a + start, b + start) for a, b in places]
        return ids, offsets

    def _stretches(self, text: Rendered) -> Iterator[tuple[int, int, bool]]:
        done = 0
        for start, end in self._control_spans(text):
            yield from self._literal(text, done, start)
            yield start, end, True
            done = end
        yield from self._literal(text, done, len(text.text))

    def _literal(self, text: Rendered, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield a stretch without control tokens.

        Text of an added token that is not special would still be read as the token, so it is split after its
        first character.
        """
        for a, b in text.literal:
            if start <= a < end and not (self._special and self._special.match(text.text, a, b)):
                yield start, a + 1, False
                start = a + 1
        if start < end:
            yield start, end, False

    def _control_spans(self, text: Rendered) -> Iterator[Span]:
        place = done = 0
        while self._special and (match := self._special.search(text.text, place)):
            inside = [b for a, b in text.literal if a < match.end() and match.start() < b]
            if inside:
                place = max(inside)
                continue
            start, end = self._with_blanks(text.text, *match.span())
            yield max(start, done), end
            place = done = end

    def _with_blanks(self, text: str, start: int, end: int) -> Span:
        """Extend the range of a control token by the white space that it absorbs."""
        for token in self._greedy.values():
            if token.content == text[start:end]:
                if token.lstrip:
                    start = len(text[:start].rstrip())
                if token.rstrip:
                    end = len(text) - len(text[end:].lstrip())
                break
        return start, end


def _as_letters(text: Rendered) -> bool:
    """Whether the text contains no control tokens."""
    return text.plain and not text.parsed


class PromptEncoder:
    """Tokenizes prompts for sampling: the ids are the same as in training.

    Args:
        tokenizer: its chat template and tokens must not change afterwards.

    Raises:
        ModelError: the tokenizer has no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer)
        self._encoder = Encoder(tokenizer)

    def ids(
        self,
        prompt: str | Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        parsed: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a prompt; arguments as `encode_prompt`.

        Raises:
            RowError: the chat template refuses the prompt.
            DataError: the prompt is messages, and there is no chat template.
        """
        encoder = self._encoder
        if not isinstance(prompt, str):
            renderer = self._renderer.using(template_kwargs, parsed=parsed)
            return encoder.prompt_ids(renderer.prompt(prompt, tools, parsed=parsed))
        ids = encoder.text_ids(prompt, literal=not parsed)
        written = parsed and encoder.begin == ids[:1]
        return [*([] if written else encoder.begin), *ids]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    parsed: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokenize a prompt for sampling: the ids are the same as in training.

    A text is tokenized unchanged; messages are rendered by the chat template with its generation prompt. The
    BOS token occurs once. For many prompts, `PromptEncoder` is faster.

    Args:
        parsed: read the text of special tokens in the prompt as tokens (`special_tokens: parse`).
        template_kwargs: variables of the chat template.
    """
    encoder = PromptEncoder(tokenizer)
    return encoder.ids(prompt, tools, parsed=parsed, template_kwargs=template_kwargs)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the ids that end a response.

    These are the EOS token, and the tokens with which the chat template ends an answer or a tool call, if any
    (an end-of-turn marker, or the token that opens the next turn).
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        renderer, encoder = ChatRenderer(tokenizer).using(template_kwargs), Encoder(tokenizer)
        for answer in _ANSWERS:
            ids = _trained(renderer, encoder, answer)
            again = _trained(renderer, encoder, _twice(answer)) if "tool_calls" in answer else ids
            # A token between two calls does not end a response.
            last = ids[-1] if ids and ids[-1] not in again[:-1] else None
            if last in tokenizer.added_tokens_decoder and last not in ends:
                ends.append(last)
    return ends


_CALL = {"type": "function", "function": {"name": "b", "arguments": {"c": "d"}}}
_ANSWERS: tuple[Message, ...] = (
    {"role": "assistant", "content": "b"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "000000000", **_CALL}]},
)


def _twice(message: Message) -> Message:
    (call,) = message["tool_calls"]
    return {**message, "tool_calls": [call, {**call, "id": "000000001"}]}


def _trained(renderer: ChatRenderer, encoder: Encoder, answer: Message) -> list[int]:
    """Return the trained tokens of an answer; none if the template does not render it."""
    try:
        rendered = renderer.conversation([{"role": "user", "content": "a"}, answer])
    except RowError:
        return []
    ((start, end),) = rendered.spans
    if "tool_calls" in answer and "d" not in rendered.text[start:end]:
        return []
    ids, mask = encoder.encode([rendered])[0]
    return [token for token, trained in zip(ids, mask, strict=True) if trained]
