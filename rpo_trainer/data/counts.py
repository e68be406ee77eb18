"""Counts of rows by reason, and their texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
MANY_CUT = 0.25  # fraction of truncated responses above which their line is a warning

# reason → text in messages; the reasons are keys of `Audit.as_dict()`.
DROPS = {
    "empty_response": "empty or blank response",
    "fewer_than_two_responses": "fewer than two responses",
    "identical_responses": "chosen is the same as rejected",
    "identical_after_truncation": "chosen is the same as rejected after truncation",
    "too_long": "longer than max_length",
    "prompt_too_long": "the prompt leaves no room for a response",
    "no_trained_tokens": "no trained tokens",
    "no_prompt_tokens": "no tokens before the response",
    "no_ratings": "no ratings",
    "repeated_prompt": "repeated prompt (dedup)",
    "tie": "chosen and rejected have the same reward",
    "reversed": "chosen has a lower reward than rejected",
    "small_gap": "reward gap below min_gap",
    "low_chosen_reward": "chosen reward below min_chosen_reward",
    "chosen_below_quantile": "chosen reward below min_chosen_quantile",
    "chosen_not_in_top": "chosen reward outside keep_top_fraction",
    "unreadable": "unreadable row",
    "no_verdict": "no consistent verdict of the judge",
}
# Reasons for prompts whose sampled responses are equal or equally good.
ALIKE = {"fewer_than_two_responses", "tie", "identical_responses", "small_gap"}
WARNINGS = {
    "special_token_text": "text of a special token in the data, tokenized as plain text",
    "duplicate_prompt": "repeated prompt",
    "similar_prompt": "prompt repeated up to case, white space or Unicode form",
    "duplicate_responses_removed": "repeated responses removed",
    "blank_response": "blank response: the response or the row will be dropped",
    "equal_responses": "equal responses to one prompt: all but the first will be dropped",
    "truth_not_chosen": "the ground truth is not one of the responses; the best one is chosen",
    "undecided_responses_removed": "responses without a consistent verdict removed",
    "blank_responses_removed": "blank responses removed",
    "messages_as_text": "a JSON list of messages read as text, since few values of the column are such lists",
    "unusable_rewards": "rewards that are not numbers, ignored by this stage",
    "tools_not_rendered": "`tools` not rendered: no chat template, or the template omits them",
    "text_left_out": "assistant text that the chat template omits (thinking, ...) or treats as thinking",
    "prompt_text_left_out": "text of a system, user or tool turn that the chat template omits",
    "truncated": "truncated to max_length",
}
# Rows that are neither used nor dropped because of a setting of the recipe.
MAX_ROWS, WEIGHT, HELD_OUT, EVAL_ROWS = "max_rows", "weight", "eval_fraction", "eval_max_rows"
LEFT_OUT = {
    MAX_ROWS: "not used: max_rows",
    WEIGHT: "not used: weight",
    HELD_OUT: "held out: eval_fraction",
    EVAL_ROWS: "not used: max_rows of the evaluation",
}
REPEATED = ("duplicate_prompt", "similar_prompt")
# These do not change a trained row, and are reported at INFO.
HARMLESS = {*REPEATED, "truth_not_chosen"}


def unread_key(key: str) -> str:
    """Return the warning about a key of messages that is not rendered."""
    return f"message key `{key}`, which the chat template does not render, or not in every turn"


def unread_columns(source: str, columns: Sequence[str]) -> str:
    """Return the warning about columns of a source that are not read."""
    return f"{source}: columns not read: {', '.join(columns)}"


def unread_variable(name: str) -> str:
    """Return the warning about a variable of `chat_template_kwargs` that no template reads."""
    return f"`{name}` in `chat_template_kwargs`, which the chat template does not read"


@dataclass
class SpecialText:
    """Rows of a source searched for the text of control tokens, and the tokens found."""

    of: int = 0
    rows: int = 0
    tokens: set[str] = field(default_factory=set)

    def add(self, other: SpecialText) -> None:
        self.of += other.of
        self.rows += other.rows
        self.tokens |= other.tokens


@dataclass
class TruncatedResponses:
    """Truncated responses of a source, among `of` trained responses."""

    count: int = 0
    of: int = 0

    def add(self, other: TruncatedResponses) -> None:
        """Add the counts of further responses."""
        self.count += other.count
        self.of += other.of

    @property
    def many(self) -> bool:
        """Whether more than the fraction `MANY_CUT` of the responses are truncated."""
        return self.count > MANY_CUT * self.of

    def text(self) -> str:
        """Return the message about them."""
        return (
            f"{self.count} of {self.of} responses ({percent(self.count, self.of)}) are truncated, and "
            "trained without an end token"
        )

    def as_dict(self) -> dict[str, int]:
        return {"count": self.count, "of": self.of}


class Count:
    """A number of rows and the ids of the first few; `of`: base of the percentage, None for all used rows."""

    def __init__(self) -> None:
        self.count = 0
        self.of: int | None = None
        self.examples: list[str] = []

    def add(self, row_id: str | None) -> None:
        self.count += 1
        if row_id is not None and len(self.examples) < EXAMPLES:
            self.examples.append(row_id)

    def add_all(self, other: Count) -> None:
        """Add the rows of another count."""
        self.count += other.count
        self.examples = [*self.examples, *other.examples][:EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        of = {} if self.of is None else {"of": self.of}
        return {"count": self.count, "examples": self.examples, **of}


class Differences:
    """Rows of a source whose prompts are rendered differently for generation and for training.

    `example` has both texts of the first such row, around the first difference: (generation, training).
    """

    def __init__(self) -> None:
        self.of = 0
        self.rows = Count()
        self.example: tuple[str, str] | None = None

    def add(self, row_id: str | None, differs: tuple[str, str] | None) -> None:
        self.of += 1
        if differs is not None:
            self.rows.add(row_id)
            self.example = self.example or differs

    def add_all(self, other: Differences) -> None:
        """Add the rows of another count."""
        self.of += other.of
        self.rows.add_all(other.rows)
        self.example = self.example or other.example

    def text(self) -> str | None:
        """Return the warning; None if there is no difference."""
        if self.example is None:
            return None
        generation, training = map(repr, self.example)
        return (
            f"in {self.rows.count} rows ({percent(self.rows.count, self.of)}) the prompt in training differs "
            f"from the prompt for generation{examples_of(self.rows)}: generation {generation}, training "
            f"{training}"
        )

    def as_dict(self) -> dict[str, Any]:
        found = {"of": self.of, "example": self.example, "text": self.text()}
        return {**self.rows.as_dict(), **found}


def percent(part: int, whole: int) -> str:
    """Format a fraction: `83%`, `0.4%`; 0% only if it is zero, and 100% only if it is one."""
    share = min(1.0, part / whole) if whole else 1.0
    if share > 0.995 and part < whole:
        return "over 99%"
    digits = 0 if share >= 0.1 else 1
    return "under 0.1%" if 0 < share < 0.0005 else f"{100 * share:.{digits}f}%"


def filtered(found: dict[str, Any]) -> str:
    """Return how many rows pass a filter, and its threshold."""
    threshold = found.get("min_chosen_reward")
    at_least = "" if threshold is None else f" (chosen reward at least {threshold:g})"
    return f"filter: {found['passed']} of {found['rows']} rows pass{at_least}"


def rows_word(count: Count) -> str:
    """Return `row` or `rows`."""
    return "row" if count.count == 1 else "rows"


def examples_of(count: Count) -> str:
    """Return the ids of the first few rows in parentheses."""
    return f" ({', '.join(count.examples)})" if count.examples else ""


def quantiles(ordered: Sequence[float]) -> dict[str, float]:
    """Return min, median, mean, p95 and max of ascending numbers; {} for none."""
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": sum(ordered) / len(ordered),
        "p95": ordered[round(0.95 * last)],
        "max": ordered[last],
    }
