"""Counts of rows by reason, and the words for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
MANY_CUT = 0.25  # share of cut responses above which their line is a warning

# reason → its text in messages; the short names are the keys of `Audit.as_dict()`.
DROPS = {
    "empty_response": "a response is empty or blank",
    "fewer_than_two_responses": "fewer than two responses",
    "identical_responses": "chosen is the same as rejected",
    "identical_after_truncation": "chosen is the same as rejected after tokenising and cutting",
    "too_long": "longer than max_length",
    "prompt_too_long": "the prompt leaves no room for a response",
    "no_trained_tokens": "no trained token is left",
    "no_prompt_tokens": "no token in front of the response",
    "no_ratings": "no rating of any attribute",
    "repeated_prompt": "prompt used before (dedup)",
    "tie": "chosen and rejected have the same reward",
    "reversed": "chosen has a lower reward than rejected",
    "small_gap": "reward gap below min_gap",
    "low_chosen_reward": "chosen reward below min_chosen_reward",
    "chosen_below_quantile": "chosen reward below min_chosen_quantile",
    "chosen_not_in_top": "chosen reward not in keep_top_fraction",
    "unreadable": "the row cannot be read",
    "no_verdict": "the judge gave no consistent verdict",
}
# Reasons that drop prompts to which a policy gives equal, or equally good, responses.
ALIKE = {"fewer_than_two_responses", "tie", "identical_responses", "small_gap"}
WARNINGS = {
    "special_token_text": "text of a special token inside the data, tokenised as text",
    "duplicate_prompt": "prompt seen before",
    "similar_prompt": "prompt seen before but for case, white space or Unicode form",
    "duplicate_responses_removed": "the same response more than once; kept once",
    "blank_response": "a response is blank: it, or the row, will be dropped",
    "equal_responses": "responses to one prompt are the same: all but the first will be dropped",
    "truth_not_chosen": "the ground truth is none of the responses; the best is chosen",
    "undecided_responses_removed": "responses without a consistent verdict removed, the others kept",
    "blank_responses_removed": "blank responses removed, the others kept",
    "messages_as_text": "text that is a JSON list of messages, read as text: few values of its column are",
    "unusable_rewards": "rewards that are not numbers, ignored by this stage",
    "tools_not_rendered": "`tools` that are not written: no chat template is used, or it leaves them out",
    "text_left_out": "assistant text that the chat template leaves out (thinking, ...) or takes for thinking",
    "prompt_text_left_out": "text of a system, user or tool turn that the chat template leaves out",
    "truncated": "cut to max_length",
}
# Rows that are neither used nor dropped, since a recipe asks for it.
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
    """The warning about a key of messages that does not reach the tokens."""
    return (
        f"the key `{key}` of messages, which the chat template does not write, or not in every turn"
    )


def unread_variable(name: str) -> str:
    """The warning about a variable of `chat_template_kwargs` that no template reads."""
    return f"`{name}` of `chat_template_kwargs`, which no chat template reads there"


@dataclass
class SpecialText:
    """Rows of a source that were looked at for the text of control tokens, and what was found."""

    of: int = 0
    rows: int = 0
    tokens: set[str] = field(default_factory=set)

    def add(self, other: SpecialText) -> None:
        self.of += other.of
        self.rows += other.rows
        self.tokens |= other.tokens


@dataclass
class CutResponses:
    """Responses of a source that were cut before they ended; `of`: among how many that are trained on."""

    count: int = 0
    of: int = 0

    def add(self, other: CutResponses) -> None:
        """Appends further responses."""
        self.count += other.count
        self.of += other.of

    @property
    def many(self) -> bool:
        """Whether they are more than `MANY_CUT` of the responses."""
        return self.count > MANY_CUT * self.of

    def text(self) -> str:
        """The line about them."""
        return (
            f"{self.count} of {self.of} responses ({percent(self.count, self.of)}) were cut before they "
            "ended, and are trained without an end token"
        )

    def as_dict(self) -> dict[str, int]:
        return {"count": self.count, "of": self.of}


class Count:
    """A number of rows and the ids of the first few; `of`: among how many, None: all that are used."""

    def __init__(self) -> None:
        self.count = 0
        self.of: int | None = None
        self.examples: list[str] = []

    def add(self, row_id: str | None) -> None:
        self.count += 1
        if row_id is not None and len(self.examples) < EXAMPLES:
            self.examples.append(row_id)

    def add_all(self, other: Count) -> None:
        """Appends the rows of another count."""
        self.count += other.count
        self.examples = [*self.examples, *other.examples][:EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        of = {} if self.of is None else {"of": self.of}
        return {"count": self.count, "examples": self.examples, **of}


class Differences:
    """Rows of a source that generation and training render differently, and what the first one has
    around the first difference: (generation, training)."""

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
        """Appends the rows of others."""
        self.of += other.of
        self.rows.add_all(other.rows)
        self.example = self.example or other.example

    def text(self) -> str | None:
        """The warning; None where there is no difference."""
        if self.example is None:
            return None
        generation, training = map(repr, self.example)
        return (
            f"{percent(self.rows.count, self.of)} of its rows ({self.rows.count}) are trained after "
            f"another text than generation has{examples_of(self.rows)}: generation {generation}, "
            f"training {training}"
        )

    def as_dict(self) -> dict[str, Any]:
        found = {"of": self.of, "example": self.example, "text": self.text()}
        return {**self.rows.as_dict(), **found}


def percent(part: int, whole: int) -> str:
    """A share as text: `83 %`, `0.4 %`; 0 % only of nothing, and 100 % only of all."""
    share = min(1.0, part / whole) if whole else 1.0
    if share > 0.995 and part < whole:
        return "over 99 %"
    digits = 0 if share >= 0.1 else 1
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.{digits}f} %"


def filtered(found: dict[str, Any]) -> str:
    """How many rows pass a filter, and its threshold."""
    threshold = found.get("min_chosen_reward")
    at_least = "" if threshold is None else f" (chosen reward at least {threshold:g})"
    return f"filter: {found['passed']} of {found['rows']} rows pass{at_least}"


def rows_word(count: Count) -> str:
    """`row` for one, else `rows`."""
    return "row" if count.count == 1 else "rows"


def examples_of(count: Count) -> str:
    """The ids of the first few in parentheses."""
    return f" ({', '.join(count.examples)})" if count.examples else ""


def quantiles(ordered: Sequence[float]) -> dict[str, float]:
    """min, median, mean, p95 and max of ascending numbers; {} for none."""
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
