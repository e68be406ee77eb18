"""Rendered texts, with their trained characters and the special-token text of the data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.rows import RowError
from rpo_trainer.data.turn_endings import SENTINEL
from rpo_trainer.data.turns import Found, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = 0xF0000  # first code point of a private-use plane


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize.

    Attributes:
        spans: trained character ranges of `text`, ascending.
        literal: character ranges of special-token text that is part of the data.
        plain: no chat template is used; the text has no control tokens, and the EOS token is appended.
        truncated: the response is truncated, so that no EOS token is appended.
        parsed: special-token text of the data is read as control tokens.
        differs: the texts before a trained turn in generation and in training, around their first
            difference; None if the turn follows its generation prompt.
    """

    text: str
    spans: tuple[Span, ...]
    literal: tuple[Span, ...] = ()
    plain: bool = False
    truncated: bool = False
    parsed: bool = False
    differs: tuple[str, str] | None = None


def render_plain(
    prompt: str, response: str, *, parsed: bool = False, truncated: bool = False
) -> Rendered:
    """Concatenate prompt and response; a `truncated` response gets no EOS token."""
    text = prompt + response
    return Rendered(
        text, ((len(prompt), len(text)),), plain=True, truncated=truncated, parsed=parsed
    )


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the tokenizer reads as control tokens, longest first."""
    texts = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content}
    return longest_first(texts)


def longest_first(texts: Iterable[str]) -> list[str]:
    """Return the texts in the order in which they must be matched."""
    return sorted(texts, key=lambda text: (-len(text), text))


def special_pattern(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches the texts of control tokens; None if there are none."""
    return re.compile("|".join(map(re.escape, texts))) if texts else None


class StandIns:
    """Replaces the texts of special tokens by private-use characters while a template renders the data.

    Args:
        names: texts of the tokens, longest first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._pattern = special_pattern(self._names)
        last = chr(PRIVATE + max(len(self._names) - 1, 0))
        self._stand_in = re.compile(f"[{chr(PRIVATE)}-{last}]")
        self._reserved = re.compile(f"{self._stand_in.pattern}|{SENTINEL}")

    def names_in(self, text: str) -> set[str]:
        """Return the special-token texts that a text contains."""
        return set() if self._pattern is None else set(self._pattern.findall(text))

    def hide(self, value: Any) -> Any:
        """Return `value` with special-token text replaced by private-use characters."""
        if isinstance(value, str):
            if not value.isascii() and self._reserved.search(value):
                raise RowError(
                    "the text contains private-use characters that are reserved for rendering",
                    code="data.private-use-characters",
                )
            if self._pattern is None:
                return value
            return self._pattern.sub(lambda m: chr(PRIVATE + self._names.index(m[0])), value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def show(self, found: Found) -> Rendered:
        """Restore the special-token texts, and adjust the spans."""
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
