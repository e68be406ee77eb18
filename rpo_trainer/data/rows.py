"""The one internal row format, and the checks every row passes whatever file it came from.

Rows are plain dicts, so that they can be written to JSON as they are:

    SFT row         {"id", "source", "messages": [{"role", "content", ...}]}
                    or {"id", "source", "prompt": str, "response": str}
    preference row  {"id", "source", "prompt": str | messages, "responses": [str] * K (best first),
                     "rewards": [float] * K | None, "ground_truth": str | None,
                     "truth_chosen": bool}
    rating row      {"id", "source", "prompt": str | messages, "responses": [str] (one),
                     "attributes": {name: float | None}}
    prompt row      {"id", "source", "prompt": str | messages, "ground_truth": str | None}

A row with messages may carry "tools" (a list of function descriptions for the chat template).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rpo_trainer.errors import DataError, Problems

MOST_REWARD = 1e30  # sums and squares of larger ones do not fit float32

Row = dict[str, Any]
Message = dict[str, Any]
Kind = Literal["sft", "pair", "rating", "prompt"]

# What other formats call the four roles. `function_call` is the assistant's own turn, written as
# text, so it is trained; `observation` is what a tool answered.
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}


NOT_MISSED = "rows that are left out or guessed in silence are never missed"


class RowError(Exception):
    """One row cannot be used; the text is the reason, alike for all rows with the same fault."""


class RowProblems:
    """Collects the faults of many rows, to report each kind once: how many, and the first three."""

    def __init__(self, where: str | None = None) -> None:
        self.where = where
        self._rows: dict[str, list[str]] = {}

    def add(self, reason: str, row_id: str) -> None:
        self._rows.setdefault(reason, []).append(row_id)

    def add_all(self, others: RowProblems) -> None:
        """The faults of further rows."""
        for reason, ids in others._rows.items():
            self._rows.setdefault(reason, []).extend(ids)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def errors(self, total: int, *, fix: str, why: str = NOT_MISSED) -> list[DataError]:
        return [
            DataError(
                f"{reason}: {len(ids)} of {total} rows, first {', '.join(ids[:3])}",
                where=self.where,
                why=why,
                fix=fix,
            )
            for reason, ids in self._rows.items()
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
        raise RowError(f"{what} is not text but {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{what} holds half of a surrogate pair, which is no text") from None
    return value


def is_messages(value: object) -> bool:
    """A non-empty list of objects, whatever is in them."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def to_messages(value: object, what: str) -> list[Message]:
    """Messages in any of the known spellings → role and content, order checked.

    Raises RowError: no list of messages, unknown role, content that is no text, roles out of order.
    """
    if not is_messages(value):
        raise RowError(f"{what} is not a list of messages")
    assert isinstance(value, list)
    raw_roles = [str(m.get("role", m.get("from"))).lower() for m in value]
    for role in raw_roles:
        if role not in ROLE_NAMES:
            raise RowError(f"{what} has the unknown role {role!r}")
    _check_order(raw_roles, what)
    return [
        _to_message(m, ROLE_NAMES[role], what) for m, role in zip(value, raw_roles, strict=True)
    ]


def _to_message(raw: Mapping[str, Any], role: str, what: str) -> Message:
    content = raw.get("content", raw.get("value"))
    if content is None and raw.get("tool_calls"):
        content = ""
    message: Message = {"role": role, "content": check_text(content, f"the content of {what}")}
    # Arrow gives every message every key of its column; a null key is an absent key.
    for key, value in raw.items():
        if key not in ("role", "from", "content", "value") and value is not None:
            message[key] = value
    if message.get("tool_calls"):
        message["tool_calls"] = _to_calls(message["tool_calls"], what)
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"a `weight` in {what} is neither 0 nor 1")
    return message


def _to_calls(calls: object, what: str) -> list[Row]:
    """Tool calls whose arguments are objects, as templates expect, not JSON inside a text."""
    if not is_messages(calls):
        raise RowError(f"`tool_calls` in {what} is not a list of objects")
    assert isinstance(calls, list)
    return [
        {**call, "function": _to_function(call["function"])}
        if isinstance(call.get("function"), Mapping)
        else _to_function(call)
        for call in calls
    ]


def _to_function(function: Mapping[str, Any]) -> Row:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(function)
    try:
        found = json.loads(arguments)
    except ValueError:
        found = None
    return {**function, "arguments": found if isinstance(found, dict) else arguments}


def check_conversation(messages: Sequence[Message], what: str) -> None:
    """The order of a conversation put together from checked parts; it starts with the user.

    Raises RowError.
    """
    # Two assistant turns in a row have been judged in their part, where a call is still known.
    roles = ["function_call" if m["role"] == "assistant" else str(m["role"]) for m in messages]
    _check_order(roles, what)
    first = next((m["role"] for m in messages if m["role"] != "system"), "nobody")
    if first != "user":
        raise RowError(f"{what} starts with a turn of {first}, not of the user")


def _check_order(raw_roles: Sequence[str], what: str) -> None:
    previous = previous_raw = ""
    for index, raw in enumerate(raw_roles):
        role = ROLE_NAMES[raw]
        if role == "system":
            wrong = index > 0
        elif role == "tool":
            wrong = previous not in ("assistant", "tool")
        elif role == "user":
            wrong = previous == "user"
        else:  # a call may follow the sentence that announces it; else assistant turns alternate
            wrong = previous == role and "function_call" not in (raw, previous_raw)
        if wrong:
            raise RowError(f"the roles of {what} are out of order ({raw!r} as message {index + 1})")
        previous, previous_raw = role, raw


def check_prompt_end(messages: Sequence[Message], what: str) -> None:
    """The turn before a response must be one that a response can follow."""
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(f"{what} ends with a turn of the {messages[-1]['role']}, not of the user")


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
    for message in row.get("messages", ()):
        yield message["content"]
    prompt = row.get("prompt", "")
    if isinstance(prompt, str):
        yield prompt
    else:
        yield from (message["content"] for message in prompt)
    yield from row.get("responses", ())
    if "response" in row:
        yield row["response"]
