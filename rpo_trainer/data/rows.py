"""The internal row format, and the checks of all rows.

Rows are dicts of JSON-compatible values:

    SFT row         {"id", "source", "messages": [{"role", "content", ...}]}
                    or {"id", "source", "prompt": str, "response": str}
    preference row  {"id", "source", "prompt": str | messages, "responses": [str] * K (best first),
                     "rewards": [float] * K | None, "ground_truth": str | None,
                     "truth_chosen": bool}, optionally "finished": [bool] * K
    rating row      {"id", "source", "prompt": str | messages, "responses": [str] (one),
                     "attributes": {name: float | None}}
    prompt row      {"id", "source", "prompt": str | messages, "ground_truth": str | None}

Optional fields: "tools", a list of function descriptions for the chat template. "response_fields", for each
response that was a message the fields other than role and content (thinking, for example). "finished", false
for each truncated response (by `max_new_tokens`); without it all responses are complete. "special_tokens",
`text` or `parse`, how to read the text of special tokens. "chat_template_kwargs", the variables of the chat
template, merged from the row, its source and the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rpo_trainer.errors import DataError, Problems

MOST_REWARD = 1e30  # sums and squares of larger rewards overflow float32

Row = dict[str, Any]
Message = dict[str, Any]
Kind = Literal["sft", "pair", "rating", "prompt"]
SpecialTokens = Literal["text", "parse"]
Truncation = Literal["drop", "truncate"]  # drop rows longer than max_length, or truncate them

# Keys of an assistant's thinking; a chat template reads one of them.
THINKING = ("reasoning_content", "thinking", "reasoning")
# Keys and columns of content other than text.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class RowError(Exception):
    """A row cannot be used.

    Args:
        reason: the same for all rows with the same fault.
        code: stable identifier of the fault, as for `RPOTrainerError`.
    """

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return self.reason


class RowProblems:
    """Collects the faults of rows, to report each kind once, with its count and the first three row ids."""

    def __init__(self, where: str | None = None) -> None:
        self.where = where
        self._rows: dict[tuple[str, str], list[str]] = {}  # ids by reason and code

    def add(self, fault: RowError, row_id: str) -> None:
        self._rows.setdefault((fault.reason, fault.code), []).append(row_id)

    def add_all(self, others: RowProblems) -> None:
        """Add the faults of further rows."""
        for fault, ids in others._rows.items():
            self._rows.setdefault(fault, []).extend(ids)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def errors(self, total: int, *, fix: str, why: str | None = None) -> list[DataError]:
        """Return one error for each kind of fault, with details `rows` (ids) and `of` (number of rows)."""
        return [
            DataError(
                f"{reason}: {len(ids)} of {total} rows, first {', '.join(ids[:3])}",
                code=code,
                where=self.where,
                why=why,
                fix=fix,
                details={"rows": ids, "of": total},
            )
            for (reason, code), ids in self._rows.items()
        ]

    def raise_if_any(self, total: int, *, fix: str, why: str | None = None) -> None:
        """Raise DataError for one kind of fault, Problems for several."""
        raise_all(self.errors(total, fix=fix, why=why))


def raise_all(errors: Sequence[DataError]) -> None:
    """Raise one error as it is and several as Problems; do nothing for none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)


def is_blank(text: str) -> bool:
    """Whether a text is empty or only white space."""
    return not text.strip()


def check_text(value: object, what: str) -> str:
    """Return `value` if it is text that a tokenizer accepts; otherwise raise RowError."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {type(value).__name__}, not text", code="data.wrong-type")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(
                f"{what} contains a lone surrogate, which is not valid text",
                code="data.lone-surrogate",
            ) from None
    return value


def is_empty(value: object) -> bool:
    """Whether a value is null, or an empty text, list or object at any depth."""
    if value is None or value in ("", b""):
        return True
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return isinstance(value, list | tuple) and all(map(is_empty, value))


def leaf_texts(value: object) -> Iterator[str]:
    """Yield all texts in a value, at any depth, that are not blank."""
    if isinstance(value, str):
        if not is_blank(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaf_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaf_texts(item)


def with_responses(row: Row, indices: Sequence[int]) -> Row:
    """Return the row with only the responses `indices`, in this order, and their rewards and other fields."""
    chosen = {
        name: [row[name][i] for i in indices]
        for name in ("responses", "rewards", "response_fields", "finished")
        if row.get(name) is not None
    }
    return {**row, **chosen}


def extra_message_fields(turn: Message) -> Row:
    """Return the fields of a response's message other than its text, for `response_fields`."""
    text = ("role", "content", "weight", "tool_calls")
    return {key: value for key, value in turn.items() if key not in text}


def is_truncated(row: Row, number: int) -> bool:
    """Whether a response is truncated, so that no end token is trained after it."""
    return bool(row.get("finished")) and not row["finished"][number]


def response_key(row: Row, number: int) -> str:
    """Return a key that is equal for responses with the same text, thinking and truncation."""
    return repr((response_message(row, number), is_truncated(row, number)))


def response_message(row: Row, number: int) -> Message:
    """Return a response as the assistant turn that follows the prompt."""
    fields = row["response_fields"][number] if row.get("response_fields") else {}
    return {"role": "assistant", "content": row["responses"][number], **fields}


def reward_fault(value: object) -> str | None:
    """Return why `value` is not a reward ("text", "NaN", …); None if it is one."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, str):
        return "text"
    if not isinstance(value, int | float):
        return f"of type {type(value).__name__}"
    try:
        number = float(value)
    except OverflowError:
        return "infinite"
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "infinite"
    return f"larger than {MOST_REWARD:g}" if abs(number) > MOST_REWARD else None


def row_texts(row: Row) -> Iterable[str]:
    """Yield every text of an internal row that is tokenized."""
    prompt = row.get("prompt", "")
    messages = [*row.get("messages", ()), *([] if isinstance(prompt, str) else prompt)]
    if isinstance(prompt, str):
        yield prompt
    for message in messages:
        yield message["content"]
    yield from row.get("responses", ())
    if "response" in row:
        yield row["response"]
    yield from leaf_texts(row.get("chat_template_kwargs"))
    for message in (*messages, *row.get("response_fields", ())):
        yield from (message[key] for key in THINKING if isinstance(message.get(key), str))


def kwargs_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the template variables of each row."""
    return [row.get("chat_template_kwargs") or {} for row in rows]
