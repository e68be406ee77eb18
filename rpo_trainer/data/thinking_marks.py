"""Markers around an assistant's thinking, in a text and at the end of a generation prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rpo_trainer.data.turn_endings import Controls

# Names of thinking markers: `<think>`, `[/THINK]`, `<|START_THINKING|>`, ...
THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)
CLOSING = re.compile("/|end", re.IGNORECASE)


@dataclass(frozen=True)
class Thoughts:
    """Finds the thinking markers of a tokenizer.

    Args:
        pattern: pattern of their texts; None if there are none.
    """

    controls: Controls
    pattern: re.Pattern[str] | None

    def apart(self, text: str, *, opened: bool) -> tuple[str, str]:
        """Split a turn into the thinking at its beginning, with markers, and the rest.

        Args:
            opened: the opening marker may be missing, since the generation prompt contains it.
        """
        marks = [] if self.pattern is None else list(self.pattern.finditer(text))
        if marks and not text[: marks[0].start()].strip():
            end = marks[min(1, len(marks) - 1)].end()
        elif marks and CLOSING.search(marks[0][0]) and opened:
            end = marks[0].end()
        else:
            end = 0
        return text[:end], text[end:]

    def split(self, text: str) -> list[str]:
        """Split a text at the markers; markers have odd indices."""
        return [text] if self.pattern is None else re.split(f"({self.pattern.pattern})", text)

    def opened_by(self, text: str) -> bool:
        """Whether a text ends with an opening thinking marker, ignoring white space."""
        text = text.rstrip()
        last = self._marks(text[self.controls.thoughts_at_end(text) :])[-1:]
        return any(not CLOSING.search(mark) for mark in last) or text.endswith("<think>")

    def treated_as_thinking(self, written: str, content: Sequence[str]) -> bool:
        """Whether the rendered turn `written` treats a part of the content as thinking.

        That is, if it contains a closing marker, and follows an opening one that is not part of it.
        """
        dense = "".join(written.split())
        for words in ("".join(text.split()) for text in content):
            begin = dense.find(words)
            closes = any(map(CLOSING.search, self._marks(words)))
            if closes and begin > 0 and self.opened_by(dense[:begin]):
                return True
        return False

    def _marks(self, text: str) -> list[str]:
        return [] if self.pattern is None else self.pattern.findall(text)
