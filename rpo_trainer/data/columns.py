"""Columns that no format reads: which of them affect training, and what they probably hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rpo_trainer.data.rows import leaf_texts

# Common names for each of the expected columns, the most likely first.
MEANT: dict[str, tuple[str, ...]] = {
    "prompt": (
        "question", "instruction", "query", "input", "problem", "user", "context", "history",
        "conversation", "conversations", "messages", "trajectory", "dialogue", "turns",
        "prompt_text", "inputs", "post", "task_prompt",
    ),
    "response": ("answer", "output", "completion", "solution", "reply", "target", "generation"),
    "chosen": (
        "chosen_response", "preferred", "better", "accepted", "winner", "positive", "pos",
        "human_ref_A", "response_0", "response_a", "response1", "answer_1",
    ),
    "rejected": (
        "rejected_response", "dispreferred", "worse", "loser", "negative", "neg",
        "human_ref_B", "response_1", "response_b", "response2", "answer_2",
    ),
    "responses": ("answers", "completions", "generations", "candidates"),
    "rewards": ("scores", "ratings", "values"),
    "messages": ("conversation", "conversations", "dialogue", "turns", "chat", "dialog"),
    "conversations": ("conversation", "messages", "dialogue", "turns"),
    "instruction": ("question", "query", "prompt", "problem"),
    "output": ("answer", "response", "completion", "solution"),
    "system": ("system_prompt", "system_message", "custom_instruction"),
    "text": ("content", "document", "body"),
}  # fmt: skip
MEANT["completion"] = MEANT["response"]
MEANT["chosen_response"] = ("chosen", *MEANT["chosen"])
MEANT["rejected_response"] = ("rejected", *MEANT["rejected"])
MEANT["context"] = MEANT["prompt"]

# Names of columns with the origin, topic or author of a row, which do not affect training.
_QUIET = re.compile(
    r"(?:(?:chosen|rejected|response|prompt|row|example|conversation|parent|message|dataset)[_-])?"
    r"(?:id|idx|index|uuid|guid|hash|key|source|sources|origin|dataset|data_source|subset|split|"
    r"task|category|categories|topic|topics|domain|subject|language|lang|locale|license|licence|"
    r"url|link|title|author|date|time|timestamp|created|created_at|updated_at|version|model|models|"
    r"model_name|metadata|meta|tag|tags|type|kind|difficulty|level|cluster|annotator|"
    r"annotator_id|worker|generator|provider)"
    r"(?:[_-](?:a|b|[0-9]+|chosen|rejected))?"
    r"|unnamed: \d+|__index_level_\d+__"  # pandas' index
)
# Numbers, flags and options that other trainers read and that change what is trained.
_TELLING = {
    "weight", "weights", "loss_weight", "sample_weight", "train", "loss", "loss_mask", "loss_scale",
    "mask", "masks", "completion_mask", "assistant_masks", "label", "labels", "margin", "margins",
    "enable_thinking", "kto_tag", "finished",
}  # fmt: skip


def unread(
    rows: Sequence[Mapping[str, Any]], columns: Iterable[str], ignored: Collection[str]
) -> tuple[list[str], list[str]]:
    """Split columns that are not read into those that may affect training and the others.

    The first are texts, at any depth, and flags that control training; not names and numbers that describe
    the origin or the quality of a row. Columns without a value in any row are in neither list.
    """
    missed, others = [], []
    for column in sorted(columns):
        values = [value for row in rows if (value := row.get(column)) is not None]
        if not values:
            continue
        quiet = column in ignored or _QUIET.fullmatch(column.lower()) is not None
        telling = column.lower() in _TELLING
        if not quiet and (telling or any(True for _ in leaf_texts(values))):
            missed.append(column)
        elif not _all_blank(values):
            others.append(column)
    return missed, others


def _all_blank(values: Sequence[Any]) -> bool:
    """Whether the values are only blank texts, empty lists and empty objects."""
    return all(
        isinstance(value, str | list | tuple | Mapping) and not any(True for _ in _leaves(value))
        for value in values
    )


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not (isinstance(value, str) and not value.strip()):
        yield value


def mapping_for(missing: Sequence[str], unread_columns: Collection[str]) -> str:
    """Return an example of the setting that maps the missing columns: `columns: {prompt: question}`."""
    left = list(unread_columns)
    pairs = []
    for column in missing:
        lowered = {column.lower(): column for column in left}
        names = [name.lower() for name in MEANT.get(column, ())]
        theirs = next((lowered[name] for name in names if name in lowered), None)
        if theirs is not None:
            left.remove(theirs)
        pairs.append(f"{column}: {theirs or 'NAME'}")
    return f"`columns: {{{', '.join(pairs)}}}`"
