"""Messages in any of the known spellings → role and content, in an order that can be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_trainer.data.rows import MEDIA, THINKING, Message, Row, RowError, check_text, is_empty

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

# Keys that say whether a turn is trained: OpenAI's, Axolotl's and ms-swift's.
TRAIN_FLAGS = ("weight", "train", "loss")


def is_messages(value: object) -> bool:
    """A non-empty list of objects, whatever is in them."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def to_messages(value: object, what: str) -> list[Message]:
    """Messages in any of the known spellings → role and content, order checked.

    Raises RowError: not a list of messages, unknown role, content that is not text, roles out of order.
    """
    if not is_messages(value):
        raise RowError(f"{what} is not a list of messages", code="data.not-messages")
    assert isinstance(value, list)
    # Arrow gives every message every key of its column; a null key is an absent key.
    given = [{key: item for key, item in m.items() if item is not None} for m in value]
    raw_roles = [str(_either(m, "role", "from", what)).lower() for m in given]
    for role in raw_roles:
        if role not in ROLE_NAMES:
            raise RowError(f"{what} has the unknown role {role!r}", code="data.unknown-role")
    _check_order([_order_role(m, r) for m, r in zip(given, raw_roles, strict=True)], what)
    return [
        _to_message(m, ROLE_NAMES[role], what) for m, role in zip(given, raw_roles, strict=True)
    ]


def _order_role(message: Mapping[str, Any], role: str) -> str:
    """The role as `_check_order` asks for it: a turn with calls is `function_call`."""
    calls = message.get("tool_calls") or message.get("function_call")
    return "function_call" if calls and ROLE_NAMES[role] == "assistant" else role


def _either(message: Mapping[str, Any], ours: str, theirs: str, what: str) -> Any:
    """The value of a key with two spellings, of which a message has one."""
    if ours in message and theirs in message and message[ours] != message[theirs]:
        raise RowError(
            f"a message of {what} has both `{ours}` and `{theirs}`, and they differ",
            code="data.conflicting-keys",
        )
    return message.get(ours, message.get(theirs))


def _to_message(raw: Mapping[str, Any], role: str, what: str) -> Message:
    content = _either(raw, "content", "value", what)
    message: Message = {"role": role}
    if role == "assistant" and not is_empty(raw.get("function_call")):
        raw = _with_call(raw, what)
    if content is None and raw.get("tool_calls"):
        content = ""
    if content is None:
        said = "`refusal` and no" if raw.get("refusal") else "no"
        raise RowError(f"a message of {what} has {said} `content`", code="data.missing-content")
    if isinstance(content, list):
        content, thought = _joined_parts(content, what)
        if thought:
            message["reasoning_content"] = thought
    message["content"] = check_text(content, f"the content of {what}")
    for key, value in raw.items():
        if key in MEDIA and not is_empty(value):
            raise RowError(
                f"a message of {what} has `{key}`, and only text can be trained on",
                code="data.not-text",
            )
        if key == "reasoning_content" and message.get(key, value) != value:
            raise RowError(
                f"a message of {what} has thinking both in its content and in `{key}`",
                code="data.conflicting-thinking",
            )
        if key not in ("role", "from", "content", "value", *TRAIN_FLAGS):
            message[key] = value
    thoughts = {str(message[key]): key for key in THINKING if not is_empty(message.get(key))}
    if len(thoughts) > 1:
        names = " and ".join(f"`{key}`" for key in thoughts.values())
        raise RowError(f"{names} of a message of {what} differ", code="data.conflicting-thinking")
    if message.get("tool_calls"):
        message["tool_calls"] = _to_calls(message["tool_calls"], what)
    weight = _weight(raw, what)
    if role == "assistant" and weight is not None:
        message["weight"] = weight
    elif (
        role != "assistant"
    ):  # these are never trained: a flag that asks for it is counted as unread
        message |= {key: raw[key] for key in TRAIN_FLAGS if raw.get(key)}
    return message


def _with_call(raw: Mapping[str, Any], what: str) -> Row:
    """The turn with OpenAI's former `function_call` as the one call of `tool_calls`."""
    if raw.get("tool_calls"):
        raise RowError(
            f"a message of {what} has both `function_call` and `tool_calls`",
            code="data.conflicting-calls",
        )
    call = raw["function_call"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(
            f"a `function_call` in {what} is not an object with a `name`",
            code="data.bad-tool-calls",
        )
    rest = {key: value for key, value in raw.items() if key != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": call}]}


def _weight(raw: Mapping[str, Any], what: str) -> Any:
    """Whether the turn is trained (1) or not (0) by any of the keys that say it; None: none does."""
    flags = {key: raw[key] for key in TRAIN_FLAGS if key in raw}
    for key, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(f"a `{key}` in {what} is neither 0 nor 1", code="data.bad-train-flag")
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowError(
            f"{' and '.join(f'`{key}`' for key in flags)} of a message of {what} differ",
            code="data.conflicting-train-flags",
        )
    return next((int(value) for value in flags.values()), None)


def _joined_parts(parts: Sequence[Any], what: str) -> tuple[str, str]:
    """(text, thinking) of content that comes in parts, as OpenAI's and Anthropic's messages have it.

    Raises RowError: a part that is neither, or that has more than its text.
    """
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    if not is_messages(parts):
        raise RowError(f"the content of {what} is not text but list", code="data.not-text")
    for part in parts:
        given = {key: value for key, value in part.items() if value is not None}
        kind = given.pop("type", None)
        if kind == "reasoning":
            given, kind = {"thinking" if k == kind else k: v for k, v in given.items()}, "thinking"
        if kind not in texts:
            raise RowError(
                f"the content of {what} is not text but list, with a part of the type {kind!r}: only "
                "text can be trained on",
                code="data.not-text",
            )
        if kind == "thinking":
            given.setdefault("thinking", given.pop("text", None))
        text = check_text(given.pop(kind, None), f"a part of the content of {what}")
        if left := [key for key, value in given.items() if not is_empty(value)]:
            raise RowError(
                f"a part of the content of {what} has `{left[0]}`, which is not read",
                code="data.unread-part",
            )
        texts[kind].append(text)
    return "".join(texts["text"]), "".join(texts["thinking"])


def _to_calls(calls: object, what: str) -> list[Row]:
    """Tool calls whose arguments are objects, as templates expect, not JSON inside a text."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise RowError(
                f"`tool_calls` in {what} is text that is not JSON", code="data.bad-tool-calls"
            ) from None
    if not is_messages(calls):
        raise RowError(
            f"`tool_calls` in {what} is not a list of objects", code="data.bad-tool-calls"
        )
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
        raise RowError(
            f"{what} starts with a turn of {first}, not of the user", code="data.role-order"
        )


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
            raise RowError(
                f"the roles of {what} are out of order ({raw!r} as message {index + 1})",
                code="data.role-order",
            )
        previous, previous_raw = role, raw


def check_prompt_end(messages: Sequence[Message], what: str) -> None:
    """The turn before a response must be one that a response can follow."""
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(
            f"{what} ends with a turn of the {messages[-1]['role']}, not of the user",
            code="data.role-order",
        )
