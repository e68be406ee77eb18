"""What a format is: its columns, and a function from a raw row to internal fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.conversation import WITH_INSTRUCTION
from rpo_trainer.data.rows import Kind, Row

Raw = Mapping[str, Any]

# text: only text. messages: text or messages. answers: a list of these. list: a list or an object. number.
# CSV and columns of texts hold messages and lists as JSON text, and CSV numbers as digits: both are read.
ColumnType = Literal["text", "messages", "answers", "list", "number"]
COLUMN_TYPES: dict[str, ColumnType] = {
    **dict.fromkeys(
        (
            "messages", "trajectory", "prompt", "context", "response", "completion", "chosen",
            "rejected", "chosen_response", "rejected_response", "response1", "response2",
            "response_1", "response_2", "preferred_output", "non_preferred_output",
        ),
        "messages",
    ),
    **dict.fromkeys(("responses", "completions"), "answers"),
    **dict.fromkeys(("text", "output", "instruction", "question"), "text"),
    **dict.fromkeys(("conversations", "history", "rewards", "ranks", "attributes"), "list"),
    **dict.fromkeys(
        (
            "chosen_reward", "rejected_reward", "score_chosen", "score_rejected", "margin", "score",
            "overall_preference", "preference_strength", *HELPSTEER_ATTRIBUTES,
        ),
        "number",
    ),
}  # fmt: skip
# Read for every format, beside its own columns.
COMMON = (
    "id", "source", "system", "tools", "ground_truth", "truth_chosen", "chat_template_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One known format.

    Attributes:
        kind: rows it gives.
        required: columns that every row must have, not null; those it is known by.
        optional: columns it also reads.
        convert: raw row → fields of an internal row (without id and source); raises RowError.
        sort: put the responses in the order of their rewards (a pair's chosen stays first).
        nullable: those of `required` that may be null in a row.
        together: rows in a row with the same `prompt` are one, with lists in these columns.
        prompts: those of `optional` of which one holds the prompt, the first that a source has; the
            others are not read.
        ignored: columns of the public data sets in this format that nobody misses.
        types: of columns that `COLUMN_TYPES` does not have, or has otherwise.
        may_lack_rewards: it has no rewards, or has them in `chosen_reward` and `rejected_reward`.
    """

    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Raw], Row]
    sort: bool = False
    nullable: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    types: Mapping[str, ColumnType] = field(default_factory=dict)
    may_lack_rewards: bool = False

    def read(self, present: Collection[str]) -> set[str]:
        """Those of its columns that are read in a source with these columns."""
        asked = self.prompt_column(present)
        unread = {c for c in self.prompts if c != asked}
        if self.prompts and asked != "instruction":
            unread |= set(WITH_INSTRUCTION)
        if self.prompts and asked != "conversations":
            unread.add("mask")
        return {*self.required, *self.optional} - unread

    def prompt_column(self, present: Collection[str]) -> str | None:
        """The column of `prompts` that holds the prompt; None: the responses bring it."""
        return next((column for column in self.prompts if column in present), None)

    def column_types(self, present: Collection[str]) -> dict[str, ColumnType]:
        """The types of its columns that are read in a source with these columns."""
        read = self.read(present)
        return {c: kind for c, kind in {**COLUMN_TYPES, **self.types}.items() if c in read}
