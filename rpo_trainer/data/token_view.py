"""Tokens as the model will get them: each in the color of what becomes of it, or between marks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import HARMLESS, WARNINGS

PROMPT, UNTRAINED, LOST = "cyan", "yellow", "red strike"
# Neighboring tokens differ in shade, so that their borders are seen.
TRAINED = ("black on green", "black on bright_green")
# The same for a terminal without colors, and for files.
_MARKS = {PROMPT: ("", ""), UNTRAINED: ("", ""), LOST: ("⟨", "⟩"), TRAINED[0]: ("[", "]")}
_NAMES = (
    ("prompt", PROMPT), ("trained", TRAINED[0]), ("response, not trained", UNTRAINED),
    ("lost to max_length", LOST),
)  # fmt: skip
# Around a special token: its name in the data, read as text, looks the same but for them.
SPECIAL = ("⟦", "⟧")
SHOWN = 400  # tokens of a prompt or a response; of a longer one both ends
_CONTEXT = 4  # tokens decoded in front of one, since some tokenizers join words by what precedes
_JOINERS = "\u200c\u200d"  # parts of emoji and of words


@dataclass(frozen=True)
class TokenView:
    """Shows tokens of one tokenizer.

    Args:
        colors: else marks in the text: `[trained]`, `⟨lost to max_length⟩`.
    """

    tokenizer: PreTrainedTokenizerBase
    colors: bool = True

    def legend(self, names: Sequence[tuple[str, str]] = _NAMES) -> Text:
        """What the colors mean.

        Args:
            names: of what is shown, each with its style.
        """
        line = Text("   ").join(self._example(name, style) for name, style in names)
        opening, closing = SPECIAL
        return line.append(
            f"   {opening}special token{closing}: one token; without the marks, letters"
        )

    def _example(self, name: str, style: str) -> Text:
        unmarked = not self.colors and _MARKS[style] == ("", "")
        return self.styled(f"{name} (no marks)" if unmarked else name, style)

    def tokens(self, ids: Sequence[int], styles: Sequence[str], most: int = SHOWN) -> Text:
        """The text of the tokens, each in its style; of more than `most` tokens both ends."""
        line = Text()
        half = most // 2
        parts = [(0, len(ids))]
        if len(ids) > most:
            parts = [(0, half), (len(ids) - half, len(ids))]
        for number, (start, end) in enumerate(parts):
            if number:
                line.append(f" … {len(ids) - 2 * half:,} tokens … ", "dim")
            pieces = self._marked(ids, pieces_of(self.tokenizer, ids, start, end))
            for style, text in pieces if self.colors else _runs(pieces, styles):
                line.append_text(self.styled(text, styles[style]))
        return line

    def _marked(self, ids: Sequence[int], pieces: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The pieces with marks around those that are one added token: special ones, and tags."""
        added = self.tokenizer.added_tokens_decoder
        opening, closing = SPECIAL

        def marked(number: int, text: str) -> str:
            token = added.get(ids[number])
            if token is None or not token.content.strip() or token.content not in text:
                return text
            return text.replace(token.content, f"{opening}{token.content}{closing}")

        return [(number, marked(number, text)) for number, text in pieces]

    def styled(self, text: str, style: str) -> Text:
        if self.colors:
            return Text(visible(text), style)
        before, behind = _MARKS[TRAINED[0] if style in TRAINED else style]
        return Text(f"{before}{visible(text)}{behind}")


def warnings_of(audit: Audit) -> list[str]:
    """The warnings of the audit of one row, without counts: a row says nothing of its source."""
    found = [WARNINGS.get(reason, reason) for reason in audit.warnings if reason not in HARMLESS]
    found += [
        different(*each.example) for each in audit.generation.values() if each.example is not None
    ]
    found += [each.text() for each in audit.cut.values() if each.count]
    return [visible(text) for text in (*found, *audit.remarks)]


def different(generation: str, training: str) -> str:
    """The warning about a turn that generation and training render differently.

    Args:
        generation, training: what they have around the first difference.
    """
    return (
        "a trained turn does not follow its generation prompt: generation has "
        f"{generation!r}, training {training!r}"
    )


def trained_styles(mask: Sequence[int], untrained: str = UNTRAINED) -> list[str]:
    """The style of each token with this mask (1 = trained)."""
    return [TRAINED[i % 2] if trained else untrained for i, trained in enumerate(mask)]


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int
) -> list[tuple[int, str]]:
    """Each token's number and its text; the tokens of one character come as one, under the last."""
    found: list[tuple[int, str]] = []
    done = start
    for number in range(start, end):
        first = max(start, done - _CONTEXT)
        before = _decoded(tokenizer, ids[first:done])
        text = _decoded(tokenizer, ids[first : number + 1])[len(before) :]
        if text.endswith("�") and number + 1 < end and number - done < _CONTEXT:
            continue  # the bytes of a character so far
        found.append((number, text))
        done = number + 1
    return found


def _runs(pieces: list[tuple[int, str]], styles: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Neighbors of one meaning joined: marks around every token would hide the text."""
    held: tuple[int, str] | None = None
    for number, text in pieces:
        if held is not None and _meaning(styles[held[0]]) == _meaning(styles[number]):
            held = (held[0], held[1] + text)
            continue
        if held is not None:
            yield held
        held = (number, text)
    if held is not None:
        yield held


def _meaning(style: str) -> str:
    return "trained" if style in TRAINED else style


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def visible(text: str) -> str:
    """Line ends shown and kept; control characters as their pictures: data must not steer a terminal."""
    shown = []
    for character in text:
        code = ord(character)
        if character == "\n":
            shown.append("↵\n")
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif code == 0x7F:
            shown.append("␡")
        elif unicodedata.category(character) in ("Cc", "Cf") and character not in _JOINERS:
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(character)
    return "".join(shown)
