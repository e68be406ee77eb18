"""The one internal row format, and the checks every row passes whatever file it came from.

Rows are plain dicts, so that they can be written to JSON as they are:

    SFT row         {"id", "source", "messages": [{"role", "content", ...}]}
                    or {"id", "source", "prompt": str, "response": str}
    preference row  {"id", "source", "prompt": str | messages, "responses": [str] * K (best first),
                     "rewards": [float] * K | None, "ground_truth": str | None,
                     "truth_chosen": bool}, perhaps "finished": [bool] * K
    rating row      {"id", "source", "prompt": str | messages, "responses": [str] (one),
                     "attributes": {name: float | None}}
    prompt row      {"id", "source", "prompt": str | messages, "ground_truth": str | None}

A row with messages may carry "tools" (a list of function descriptions for the chat template). A
row whose responses came as messages may carry "response_fields": for each response the keys of its
message beside role and content (thinking, for example). "finished" is false for each response that was
cut before it ended (by `max_new_tokens`); without it all have ended. "special_tokens" is `text` or
`parse` where the source says how text of special tokens is read; "chat_template_kwargs" are the variables
that its chat template gets, those of the row, its source and the model together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rpo_trainer.errors import DataError, Problems

MOST_REWARD = 1e30  # sums and squares of larger ones do not fit float32

Row = dict[str, Any]
Message = dict[str, Any]
Kind = Literal["sft", "pair", "rating", "prompt"]
SpecialTokens = Literal["text", "parse"]
Truncation = Literal["drop", "cut"]  # a row longer than max_length, or its end

NOT_MISSED = "rows are never dropped or guessed silently"

# Keys that hold what an assistant thought before it answered; a chat template reads one of them.
THINKING = ("reasoning_content", "thinking", "reasoning")
# Keys and columns of what is not text.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class RowError(Exception):
    """One row cannot be used.

    Args:
        reason: alike for all rows with the same fault.
        code: of the fault, as of an RPOTrainerError.
    """

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return self.reason


class RowProblems:
    """Collects the faults of many rows, to report each kind once: how many, and the first three."""

    def __init__(self, where: str | None = None) -> None:
        self.where = where
        self._rows: dict[tuple[str, str], list[str]] = {}  # ids by reason and code

    def add(self, fault: RowError, row_id: str) -> None:
        self._rows.setdefault((fault.reason, fault.code), []).append(row_id)

    def add_all(self, others: RowProblems) -> None:
        """The faults of further rows."""
        for fault, ids in others._rows.items():
            self._rows.setdefault(fault, []).extend(ids)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def errors(self, total: int, *, fix: str, why: str = NOT_MISSED) -> list[DataError]:
        """One error for each fault; its details have the ids of `rows`, and `of` how many they are."""
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

    def raise_if_any(self, total: int, *, fix: str, why: str = NOT_MISSED) -> None:
        """Raises DataError, or Problems where there are several kinds."""
        raise_all(self.errors(total, fix=fix, why=why))


def raise_all(errors: Sequence[DataError]) -> None:
    """Raises nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)


def is_blank(text: str) -> bool:
    """Nothing but white space."""
    return not text.strip()


def check_text(value: object, what: str) -> str:
    """`value` when it is text that a tokenizer can take, else RowError."""
    if not isinstance(value, str):
        raise RowError(f"{what} is not text but {type(value).__name__}", code="data.wrong-type")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(
                f"{what} holds a lone surrogate, which is not valid text",
                code="data.lone-surrogate",
            ) from None
    return value


def is_empty(value: object) -> bool:
    """Null, or a text, list or object without anything in it."""
    if value is None or value in ("", b""):
        return True
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return isinstance(value, list | tuple) and all(map(is_empty, value))


def leaf_texts(value: object) -> Iterator[str]:
    """Every text in a value of any depth, without those that are blank."""
    if isinstance(value, str):
        if not is_blank(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaf_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaf_texts(item)


def with_responses(row: Row, kept: Sequence[int]) -> Row:
    """The row with these of its responses, in this order, and what belongs to each of them."""
    chosen = {
        name: [row[name][i] for i in kept]
        for name in ("responses", "rewards", "response_fields", "finished")
        if row.get(name) is not None
    }
    return {**row, **chosen}


def fields_beside(turn: Message) -> Row:
    """What the turn of a response says beside its text (thinking, for example): `response_fields`."""
    text = ("role", "content", "weight", "tool_calls")
    return {key: value for key, value in turn.items() if key not in text}


def is_cut(row: Row, number: int) -> bool:
    """Whether a response was cut before it ended, so that no end token is trained after it."""
    return bool(row.get("finished")) and not row["finished"][number]


def response_key(row: Row, number: int) -> str:
    """Equal for responses that are trained alike: text, thinking, and whether it has ended."""
    return repr((response_message(row, number), is_cut(row, number)))


def response_message(row: Row, number: int) -> Message:
    """A response as the turn that follows the prompt."""
    fields = row["response_fields"][number] if row.get("response_fields") else {}
    return {"role": "assistant", "content": row["responses"][number], **fields}


def reward_fault(value: object) -> str | None:
    """What keeps `value` from being a reward ("text", "NaN", …); None when it is one."""
    if value is None:
        return "absent or null"
    if isinstance(value, bool):
        return "a bool"
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
    return f"beyond {MOST_REWARD:g}" if abs(number) > MOST_REWARD else None


def row_texts(row: Row) -> Iterable[str]:
    """Every text of an internal row that ends up in front of the tokenizer."""
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
    """The variables of each row."""
    return [row.get("chat_template_kwargs") or {} for row in rows]
