"""Show the tokens that the model receives, colored or marked by how they are used."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import HARMLESS, WARNINGS

PROMPT, UNTRAINED, LOST = "cyan", "yellow", "red strike"
# Adjacent tokens alternate in shade, so that their boundaries are visible.
TRAINED = ("black on green", "black on bright_green")
# Marks for terminals without colors, and for files.
_MARKS = {PROMPT: ("", ""), UNTRAINED: ("", ""), LOST: ("⟨", "⟩"), TRAINED[0]: ("[", "]")}
_NAMES = (
    ("prompt", PROMPT), ("trained", TRAINED[0]), ("response, not trained", UNTRAINED),
    ("beyond max_length", LOST),
)  # fmt: skip
# Around a special token, to distinguish it from the same characters as text.
SPECIAL = ("⟦", "⟧")
SHOWN = 400  # tokens of a prompt or a response; the middle of a longer one is omitted
_CONTEXT = 4  # preceding tokens to decode with each token, since decoding may depend on them
_JOINERS = "\u200c\u200d"  # parts of emoji and of words


@dataclass(frozen=True)
class TokenView:
    """Shows tokens of one tokenizer.

    Args:
        colors: use colors; otherwise marks in the text: `[trained]`, `⟨beyond max_length⟩`.
    """

    tokenizer: PreTrainedTokenizerBase
    colors: bool = True

    def legend(self, names: Sequence[tuple[str, str]] = _NAMES) -> Text:
        """Return the legend of the colors.

        Args:
            names: (name, style) of each entry.
        """
        line = Text("   ").join(self._example(name, style) for name, style in names)
        opening, closing = SPECIAL
        return line.append(
            f"   {opening}special token{closing}: one token; without the marks, plain text"
        )

    def _example(self, name: str, style: str) -> Text:
        unmarked = not self.colors and _MARKS[style] == ("", "")
        return self.styled(f"{name} (no marks)" if unmarked else name, style)

    def tokens(self, ids: Sequence[int], styles: Sequence[str], most: int = SHOWN) -> Text:
        """Return the text of the tokens in their styles; of more than `most` tokens the middle is omitted."""
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
        """Put marks around pieces that are a single added token."""
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
        before, after = _MARKS[TRAINED[0] if style in TRAINED else style]
        return Text(f"{before}{visible(text)}{after}")


def warnings_of(audit: Audit) -> list[str]:
    """Return the warnings in the audit of one row, without counts."""
    found = [WARNINGS.get(reason, reason) for reason in audit.warnings if reason not in HARMLESS]
    found += [
        different(*each.example) for each in audit.generation.values() if each.example is not None
    ]
    found += [each.text() for each in audit.cut.values() if each.count]
    return [visible(text) for text in (*found, *audit.remarks)]


def different(generation: str, training: str) -> str:
    """Return the warning about a turn that is rendered differently for generation and for training.

    Args:
        generation, training: the texts around the first difference.
    """
    return (
        "a trained turn does not follow its generation prompt: generation has "
        f"{generation!r}, training {training!r}"
    )


def trained_styles(mask: Sequence[int], untrained: str = UNTRAINED) -> list[str]:
    """Return the style of each token for this mask (1 = trained)."""
    return [TRAINED[i % 2] if trained else untrained for i, trained in enumerate(mask)]


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int
) -> list[tuple[int, str]]:
    """Return index and text of each token; tokens of one character are joined, with the last index."""
    found: list[tuple[int, str]] = []
    done = start
    for number in range(start, end):
        first = max(start, done - _CONTEXT)
        before = _decoded(tokenizer, ids[first:done])
        text = _decoded(tokenizer, ids[first : number + 1])[len(before) :]
        if text.endswith("�") and number + 1 < end and number - done < _CONTEXT:
            continue  # the bytes of an incomplete character
        found.append((number, text))
        done = number + 1
    return found


def _runs(pieces: list[tuple[int, str]], styles: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Join adjacent tokens with the same meaning: marks around every token would hide the text."""
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
    """Show line breaks, and replace control characters, which could control the terminal, by symbols."""
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
