"""Convert sampled tokens to the text that training renders back to these tokens.

Training renders the text of a response with the chat template again. Text that the template adds around it (a
line break, the tags of thinking or of a channel) must be removed, and all other text must be kept. Each
response is therefore rendered and tokenized as in training, in several candidate forms, and the first
form that reproduces the sampled text with the same control tokens is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_trainer.data.encode import Encoder
from rpo_trainer.data.rendered import Rendered, render_plain
from rpo_trainer.data.rows import Message, RowError, is_blank
from rpo_trainer.data.trained_spans import ChatRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Placeholders for text and thinking, which show what a template writes around them.
WORDS, THOUGHT = "rpo0words", "rpo0thought"
SHOWN = 200  # characters of an example


class Sample(NamedTuple):
    """One response; `finished` is False if `max_new_tokens` truncated it."""

    text: str
    finished: bool


@dataclass
class PromptTokens:
    """A prompt whose responses were sampled.

    Args:
        prompt: text or messages.
        ids: its tokens.
        tools, parsed, template_kwargs: as in `iter_responses`.
        frames: the template's text around thinking and response, and around the response alone; None: not
            rendered yet.
    """

    prompt: str | list[Message]
    ids: list[int]
    tools: list[dict[str, Any]] | None = None
    parsed: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    frames: list[tuple[str, ...]] | None = None


@dataclass
class ResponseReader:
    """Converts sampled tokens to text, and counts the responses that no text reproduces.

    Args:
        tokenizer: with its chat template.
        ends: tokens that end a response.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    checked: int = field(init=False, default=0)
    changed: int = field(init=False, default=0)
    example: tuple[str, str] | None = field(init=False, default=None)

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, token in added if token.special)

    def read(self, prompt_tokens: PromptTokens, row: list[int]) -> Sample:
        """Convert `row`, the tokens sampled after a prompt, up to the end token or the limit.

        If no form reproduces the tokens, the result is the text without control tokens; for a truncated
        response, the form that reproduces the longest prefix.
        """
        stop = next((place for place, token in enumerate(row) if token in self.ends), None)
        ignored = self._special & {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        ids, finished = [token for token in row[:stop] if token not in ignored], stop is not None
        plain = self._text(prompt_tokens, ids, skip=True)
        special = not self._special.isdisjoint(ids)
        if not special and (isinstance(prompt_tokens.prompt, str) or is_blank(plain)):
            return Sample(plain, finished)
        self.checked += 1
        second: str | None = None
        best, most = plain, 0
        for text in self._forms(prompt_tokens, ids, plain, special=special):
            same_prompt, trained = self._trained(prompt_tokens, text, truncated=not finished)
            if self._same(trained, ids):
                if same_prompt:
                    return Sample(text, finished)
                second = text if second is None else second
            elif not finished and len(trained) > most and trained == ids[: len(trained)]:
                best, most = text, len(trained)
        if second is not None:  # training warns about the different prompt
            return Sample(second, finished)
        self.changed += 1
        if self.example is None:
            _, trained = self._trained(prompt_tokens, best, truncated=not finished)
            self.example = (
                self._decoded(row[: None if stop is None else stop + 1]),
                self._decoded(trained),
            )
        return Sample(best, finished)

    def warn(self) -> None:
        """Log one warning about responses whose trained text differs from the sampled one."""
        if self.changed:
            sampled, trained = self.example or ("", "")
            logger.warning(
                "%d of %d sampled responses would be trained as a different text: the chat template does not "
                "reproduce them (truncated thinking, tool calls, white space, a control token); the "
                "first: sampled %r, trained %r",
                self.changed, self.checked, sampled[:SHOWN], trained[:SHOWN],
            )  # fmt: skip

    def _forms(
        self, prompt_tokens: PromptTokens, ids: list[int], plain: str, *, special: bool
    ) -> Iterator[str]:
        raw = self._text(prompt_tokens, ids, skip=False)
        if not special:
            yield plain
        if prompt_tokens.parsed:
            yield raw
        if not isinstance(prompt_tokens.prompt, str):
            yield from self._inside(prompt_tokens, raw)
        if special:
            yield raw
            yield plain

    def _inside(self, prompt_tokens: PromptTokens, raw: str) -> Iterator[str]:
        """Yield the text without what the template writes around it, thinking as `<think>` tags.

        Every template that renders thinking reads `<think>`, that of a reward model too.
        """
        if prompt_tokens.frames is None:
            prompt_tokens.frames = [*self._frames(prompt_tokens)]
        for lead, *inner, tail in prompt_tokens.frames:
            if not raw.startswith(lead):
                continue
            text = raw[len(lead) :].removesuffix(tail)
            if not inner:
                yield text
                continue
            thought, found, words = text.partition(inner[0])
            if found:
                yield f"<think>\n{thought}\n</think>\n\n{words}"

    def _frames(self, prompt_tokens: PromptTokens) -> Iterator[tuple[str, ...]]:
        ends = [str(self.tokenizer.convert_ids_to_tokens(end)) for end in self.ends]
        for content in (f"<think>\n{THOUGHT}\n</think>\n\n{WORDS}", WORDS):
            try:
                rendered = self._rendered(prompt_tokens, content)
            except RowError:
                continue
            ((start, end),) = rendered.spans
            text = rendered.text[start:end].rstrip()
            text = text.removesuffix(next((name for name in ends if text.endswith(name)), ""))
            lead, found, tail = text.rpartition(WORDS)
            if found and content == WORDS:
                yield lead, tail
            before, thought, between = lead.partition(THOUGHT)
            if found and thought and between:
                yield before, between, tail

    def _rendered(
        self, prompt_tokens: PromptTokens, text: str, *, truncated: bool = False
    ) -> Rendered:
        if isinstance(prompt_tokens.prompt, str):
            return render_plain(
                prompt_tokens.prompt, text, parsed=prompt_tokens.parsed, truncated=truncated
            )
        renderer = self._renderer.using(prompt_tokens.template_kwargs, parsed=prompt_tokens.parsed)
        messages = [*prompt_tokens.prompt, {"role": "assistant", "content": text}]
        return renderer.conversation(
            messages,
            prompt_tokens.tools,
            last_only=True,
            parsed=prompt_tokens.parsed,
            truncated=truncated,
        )

    def _trained(
        self, prompt_tokens: PromptTokens, text: str, *, truncated: bool
    ) -> tuple[bool, list[int]]:
        """Return whether training renders the same prompt, and the trained tokens ([] if refused)."""
        try:
            ids, mask = self._encoder.encode(
                [self._rendered(prompt_tokens, text, truncated=truncated)]
            )[0]
        except RowError:
            return False, []
        if 1 not in mask:
            return False, []
        start, end = mask.index(1), len(mask) - mask[::-1].index(1)
        return ids[:start] == prompt_tokens.ids, ids[start:end]

    def _same(self, trained: list[int], ids: list[int]) -> bool:
        """Whether two responses have the same text and control tokens.

        (The sampled tokens may differ from the tokenization of their text.)
        """
        last = [place for place, token in enumerate(trained) if token in self.ends][-1:]
        body = trained[: last[0]] if last else trained
        if body == ids:
            return True
        (text, sampled_text), (marks, sampled_marks) = (
            map(self._decoded, (body, ids)),
            ([token for token in part if token in self._special] for part in (body, ids)),
        )
        return text == sampled_text and marks == sampled_marks

    def _decoded(self, ids: list[int], *, skip: bool = False) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )

    def _text(self, prompt_tokens: PromptTokens, ids: list[int], *, skip: bool) -> str:
        """Decode a response. After a text prompt it is decoded with the prompt.

        Decoded alone, a SentencePiece tokenizer drops the leading space.
        """
        if not isinstance(prompt_tokens.prompt, str):
            return self._decoded(ids, skip=skip)
        before = self._decoded(prompt_tokens.ids, skip=skip)
        text = self._decoded(prompt_tokens.ids + ids, skip=skip)
        return text[len(before) :] if text.startswith(before) else self._decoded(ids, skip=skip)
