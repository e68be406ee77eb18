"""Rows as scripts written for TRL pass them: through a formatting function, as plain text, or tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rpo_trainer.data import Audit
from rpo_trainer.data.arrow_rows import Array, ArrowRows
from rpo_trainer.data.example_table import ExampleTable, example_dataset
from rpo_trainer.data.tokenize import TOKENIZED
from rpo_trainer.errors import DataError

Row = Mapping[str, Any]

_IGNORED = -100  # label of a token that is not trained
_SOURCE = "dataset"
_PREFERENCES = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
_SFT = "input_ids"


def column_names(dataset: Any) -> set[str]:
    """Return the columns of a data set or of its first row; empty if it has no rows by number."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return set(names)
    try:
        first = dataset[0]
    except (TypeError, IndexError, KeyError, AttributeError):
        return set()
    return set(first) if isinstance(first, Mapping) else set()


# --- rows of text ---


def formatted_rows(dataset: Any, function: Callable[[Any], Any]) -> list[Row]:
    """Return the rows that `formatting_func` returns, called once for each row of `dataset`.

    Args:
        function: row → text to train on, a list of messages, or a row in any format.

    Raises:
        DataError: it returns something else.
    """
    return [_as_row(function(dataset[i]), i) for i in range(len(dataset))]


def _as_row(value: Any, number: int) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return {"messages": value}
    raise DataError(
        f"formatting_func returned {type(value).__name__} for row {number}",
        code="data.formatting-func",
        details={"row": number},
        where="formatting_func",
        why="it is called with one row, and older versions of TRL called it with a batch"
        if isinstance(value, list)
        else None,
        fix="return a text, a list of messages, or a row such as {'prompt': ..., 'completion': ...}",
    )


def text_rows(dataset: Any, column: str | None) -> Any:
    """Return rows of `text` from another column of plain text; other data sets unchanged.

    Args:
        column: `dataset_text_field`.
    """
    if column in (None, "text") or column not in column_names(dataset):
        return dataset
    return [{"text": dataset[i][column]} for i in range(len(dataset))]


def is_plain_text(dataset: Any) -> bool:
    """Whether the rows are texts without a prompt or turns, so that special tokens in them are tokens."""
    return column_names(dataset).isdisjoint({"messages", "conversations", "prompt", "instruction"})


# --- tokenized rows ---


class Tokenized(NamedTuple):
    """Texts of a row: token ids, and whether a token is trained."""

    ids: list[Array]
    masks: list[Array]


def tokenized_rows(
    dataset: Any,
    kind: Literal["sft", "pair", "rating"],
    *,
    max_length: int,
    truncation: str,
    audit: Audit,
) -> Any:
    """Return examples from rows that are tokenized, by the user or for TRL; None if the rows are not.

    Rows with `prompt_ids`, `response_ids` and `response_mask` are returned unchanged. For TRL, SFT:
    `input_ids`, with `labels` (-100 is not trained), or with `completion_mask` and `assistant_masks` (a
    token is trained where all that are present are 1); without them all tokens are trained. Preferences:
    `prompt_ids`, `chosen_ids`, `rejected_ids`, with or without `chosen_reward` and `rejected_reward`. No end
    token is added.

    Args:
        max_length: tokens of prompt and response; longer rows for TRL are dropped or truncated, see
            `truncation`.
        audit: counts what is dropped.

    Raises:
        DataError: columns of a row that do not match.
    """
    columns = column_names(dataset)
    if columns.issuperset(TOKENIZED):
        return dataset if hasattr(dataset, "with_format") else example_dataset(dataset)
    if kind == "sft" and _SFT in columns:
        read: Callable[[Row, int], Tokenized] = _sft
    elif kind == "pair" and (names := _preference_columns(columns)) is not None:
        read = lambda row, number: _preference(row, names)  # noqa: E731
    else:
        return None
    examples = ExampleTable()
    audit.add_read(_SOURCE, len(dataset))
    rows = ArrowRows.of(dataset) if hasattr(dataset, "with_format") else dataset
    for number in range(len(rows)):
        row = rows[number]
        row_id = str(row.get("id", f"{_SOURCE}:{number}"))
        found = read(row, number)
        longest = max(map(len, found.ids))
        if longest > max_length:
            if truncation == "drop":
                audit.drop("too_long", row_id)
                audit.add_too_long(longest)
                continue
            found = Tokenized(*([text[:max_length] for text in part] for part in found))
            audit.warn("truncated", row_id)
        prompt = _prompt_length(found)
        if not all(mask[prompt:].any() for mask in found.masks):
            audit.drop("no_trained_tokens", row_id)
            continue
        if len(found.ids) == 2 and np.array_equal(found.ids[0], found.ids[1]):
            audit.drop("identical_responses", row_id)
            continue
        audit.keep(_SOURCE)
        audit.add_lengths(prompt, (len(ids) - prompt for ids in found.ids))
        rewards = row.get("chosen_reward"), row.get("rejected_reward")
        ends = [
            int(np.flatnonzero(mask)[-1]) + 1 for mask in found.masks
        ]  # later tokens are not used
        examples.add(
            {
                "id": row_id,
                "prompt_ids": found.ids[0][:prompt],
                "response_ids": [i[prompt:end] for i, end in zip(found.ids, ends, strict=True)],
                "response_mask": [m[prompt:end] for m, end in zip(found.masks, ends, strict=True)],
                "rewards": None if None in rewards else list(rewards),
            }
        )
    audit.max_length = max_length
    return examples.dataset()


def _preference_columns(columns: set[str]) -> tuple[str, ...] | None:
    return next((names for names in _PREFERENCES if columns.issuperset(names)), None)


def _sft(row: Row, number: int) -> Tokenized:
    ids = np.asarray(row["input_ids"])
    masks = [
        np.asarray(row[name]) != 0
        for name in ("completion_mask", "assistant_masks")
        if row.get(name) is not None
    ]
    if row.get("labels") is not None:
        labels = np.asarray(row["labels"])
        _require_length(labels, ids, "labels", number)
        if ((labels != ids) & (labels != _IGNORED)).any():
            raise DataError(
                f"the labels of row {number} are not its input_ids",
                code="data.tokenized-row",
                details={"row": number},
                why="each label belongs to the token at its own position; the model shifts them",
                fix=f"use a copy of input_ids, with {_IGNORED} where a token is not trained",
            )
        masks.append(labels != _IGNORED)
    for mask in masks:
        _require_length(mask, ids, "a mask", number)
    trained = np.logical_and.reduce(masks) if masks else np.ones(len(ids), dtype=bool)
    if row.get("attention_mask") is not None:
        real = np.asarray(row["attention_mask"]) != 0
        _require_length(real, ids, "attention_mask", number)
        ids, trained = ids[real], trained[real]
    return Tokenized([ids], [trained])


def _require_length(values: Array, ids: Array, name: str, number: int) -> None:
    if len(values) != len(ids):
        raise DataError(
            f"row {number} has {len(ids)} input_ids, and {name} of length {len(values)}",
            code="data.tokenized-row",
            details={"row": number},
            fix="give each token one value",
        )


def _preference(row: Row, names: Sequence[str]) -> Tokenized:
    prompt, *responses = (np.asarray(row[name]) for name in names)
    return Tokenized(
        [np.concatenate([prompt, response]) for response in responses],
        [np.arange(len(prompt) + len(response)) >= len(prompt) for response in responses],
    )


def _prompt_length(found: Tokenized) -> int:
    """Return the number of tokens before the first trained one, at least one to predict it from."""
    return max(1, min(int(mask.argmax()) if mask.any() else len(mask) for mask in found.masks))
