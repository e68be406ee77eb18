"""A config file of another tool: its values, and the fate of each key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.environment import is_secret
from rpo_trainer.recipe.yaml_document import Key, plain_scalar

# These tools read YAML 1.1, which has more words for true and false than YAML 1.2.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}


class Note(NamedTuple):
    """A note on one key of the file.

    Attributes:
        key: the key, dotted.
        line: its line; 0 if it is not in the file.
        value: its value as text; "" if it is too long or a secret.
        text: why it has no counterpart, or how the recipe differs.
    """

    key: str
    line: int
    value: str
    text: str

    def __str__(self) -> str:
        value = f": {self.value}" if self.value else ""
        place = f" (line {self.line})" if self.line else ""
        return f"{self.key}{value}{place}: {self.text}"


@dataclass
class ForeignConfig:
    """A mapping of a foreign file. Every key is taken, left out with a reason, or reported as unknown.

    Attributes:
        tool: name of the tool.
        path: the file.
        data: the mapping.
        lines: the line of each key.
        at: key of the mapping in the file; () at the top.
        left_out: keys without a counterpart.
        not_needed: keys for behavior that is built in.
        differences: converted keys with a difference that may matter.
    """

    tool: str
    path: Path
    data: Mapping[str, Any]
    lines: Mapping[Key, int]
    at: Key = ()
    left_out: list[Note] = field(default_factory=list)
    not_needed: list[Note] = field(default_factory=list)
    differences: list[Note] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the key has a value; null counts as absent, as in these tools."""
        return self.data.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key to convert, or `default`."""
        self.seen.add(key)
        value = self.data.get(key)
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number; text such as "1e-5" in quotes is converted.

        Raises:
            RecipeError: the value is not a number.
        """
        value = self.take(key, default)
        if isinstance(value, str):
            value = plain_scalar(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(
                f"`{key}` is not a number",
                code="convert.not-a-number",
                where=self.where(key),
                fix="correct it, or remove it",
            )
        return value

    def names(self, key: str) -> list[str]:
        """Return a list of names, given as a list or as text with commas."""
        value = self.take(key, [])
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            items = [items]
        return [str(item).strip() for item in items if str(item).strip()]

    def below(self, key: str | int, data: Mapping[str, Any], *more: str | int) -> ForeignConfig:
        """Return a mapping inside this one; its notes are added to the same lists."""
        at = (*self.at, key, *more)
        return ForeignConfig(
            self.tool, self.path, data, self.lines, at, self.left_out, self.not_needed,
            self.differences,
        )  # fmt: skip

    def where(self, key: str) -> str:
        """Return FILE:LINE of a key."""
        return f"{self.path}:{self.lines.get((*self.at, key), 1)}"

    def leave_out(self, key: str, reason: str) -> None:
        """Report a key as having no counterpart."""
        self.seen.add(key)
        self.left_out.append(self._note(key, reason))

    def skip(self, keys: Mapping[str, str]) -> None:
        """Report keys that have a value (other than false) as not needed, with the reason."""
        for key, reason in keys.items():
            if self.has(key) and key not in self.seen:
                self.seen.add(key)
                if self.data[key] is not False:
                    self.not_needed.append(self._note(key, reason))

    def differs(self, key: str, text: str) -> None:
        """Report a difference between the recipe and the file."""
        self.differences.append(self._note(key, text))

    def leave_out_rest(self, reasons: Mapping[str, str]) -> None:
        """Report every remaining key whose value is not false or empty.

        Args:
            reasons: reasons of the known keys.
        """
        for key, value in self.data.items():
            if key in self.seen:
                continue
            self.seen.add(key)
            if value is None or value is False or value in ("", [], {}, "no", "off"):
                continue
            reason = reasons.get(key, f"unknown to this converter of {self.tool} configs")
            self.leave_out(key, reason)

    def unsupported(self, key: str, what: str, fix: str) -> RecipeError:
        """Return the error for a method without a counterpart."""
        return RecipeError(
            f"{what} has no counterpart in rpo-trainer",
            code="convert.unsupported-method",
            where=self.where(key),
            fix=fix,
        )

    def _note(self, key: str, text: str) -> Note:
        value = self.data.get(key)
        shown = value is not None and not isinstance(value, dict | list)
        shown = shown and not is_secret(key, value) and len(str(value)) <= 60
        word = str(value).lower() if isinstance(value, bool) else str(value)
        dotted = ".".join(map(str, (*self.at, key)))
        return Note(dotted, self.lines.get((*self.at, key), 0), word if shown else "", text)


def reasons(table: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, str]:
    """Return a mapping from keys to reasons, from pairs (reason, keys)."""
    return {key: reason for reason, keys in table for key in keys}
