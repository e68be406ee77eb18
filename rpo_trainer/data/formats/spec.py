"""Definition of a format: its columns, and a function that converts a raw row to internal fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.conversation import PROMPT_COLUMNS, WITH_INSTRUCTION
from rpo_trainer.data.rows import Kind, Row

Raw = Mapping[str, Any]

# text: only text. messages: text or messages. answers: a list of these. list: a list or an object. number.
# JSON text in CSV and text columns is decoded to messages and lists, and digits in CSV to numbers.
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
# Columns that every format reads in addition to its own.
COMMON = (
    "id", "source", "system", "tools", "ground_truth", "truth_chosen", "chat_template_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One known format.

    Attributes:
        kind: kind of the rows.
        required: columns that every row must have, not null. A source with all of them has this format,
            unless `detected_by` is set.
        optional: other columns that are read.
        convert: raw row → fields of an internal row (without id and source); raises RowError.
        sort: sort the responses by reward (the chosen response of a pair stays first).
        nullable: columns of `required` that may be null.
        together: join consecutive rows with the same `prompt`, with lists in these columns.
        prompts: columns of `optional` that may hold the prompt, in order of precedence; only the first one
            that a source has is read.
        ignored: columns of public data sets in this format whose absence from training needs no warning.
        detected_by: columns that identify the format, if they differ from `required`; a source with another
            prompt column does not have this format.
        types: types of columns that `COLUMN_TYPES` lacks, or that differ from it.
        may_lack_rewards: rewards are absent, or are in `chosen_reward` and `rejected_reward`.
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
    detected_by: tuple[str, ...] = ()
    types: Mapping[str, ColumnType] = field(default_factory=dict)
    may_lack_rewards: bool = False

    def fits(self, present: Collection[str]) -> bool:
        """Whether a source with these columns has this format."""
        if not self.detected_by:
            return all(column in present for column in self.required)
        return all(column in present for column in self.detected_by) and not any(
            column in present for column in PROMPT_COLUMNS
        )

    def read(self, present: Collection[str]) -> set[str]:
        """Return the columns of the format that are read in a source with these columns."""
        prompt_column = self.prompt_column(present)
        unread = {c for c in self.prompts if c != prompt_column}
        if self.prompts and prompt_column != "instruction":
            unread |= set(WITH_INSTRUCTION)
        if self.prompts and prompt_column != "conversations":
            unread.add("mask")
        return {*self.required, *self.optional} - unread

    def prompt_column(self, present: Collection[str]) -> str | None:
        """Return the column of `prompts` that holds the prompt; None if the responses contain it."""
        return next((column for column in self.prompts if column in present), None)

    def column_types(self, present: Collection[str]) -> dict[str, ColumnType]:
        """Return the types of the columns that are read in a source with these columns."""
        read = self.read(present)
        return {c: kind for c, kind in {**COLUMN_TYPES, **self.types}.items() if c in read}
