"""Messages in any known spelling → role and content, with roles in a valid order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_trainer.data.rows import MEDIA, THINKING, Message, Row, RowError, check_text, is_empty

# Names of the four roles in other formats. `function_call` is an assistant turn with a call as text, so it is
# trained; `observation` is the result of a tool.
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

# Keys that control whether a turn is trained, of OpenAI, Axolotl and ms-swift.
TRAIN_FLAGS = ("weight", "train", "loss")


def is_messages(value: object) -> bool:
    """Whether the value is a non-empty list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def to_messages(value: object, what: str) -> list[Message]:
    """Convert messages in any known spelling to role and content, and check the order of the roles.

    Raises RowError: not a list of messages, unknown role, content that is not text, roles out of order.
    """
    if not is_messages(value):
        raise RowError(f"{what} is not a list of messages", code="data.not-messages")
    assert isinstance(value, list)
    # In Arrow every message has all keys of the column: a null value is an absent key.
    messages = [{key: item for key, item in m.items() if item is not None} for m in value]
    raw_roles = [str(_either(m, "role", "from", what)).lower() for m in messages]
    for role in raw_roles:
        if role not in ROLE_NAMES:
            raise RowError(f"unknown role {role!r} in {what}", code="data.unknown-role")
    _check_order([_order_role(m, r) for m, r in zip(messages, raw_roles, strict=True)], what)
    return [
        _to_message(m, ROLE_NAMES[role], what) for m, role in zip(messages, raw_roles, strict=True)
    ]


def _order_role(message: Mapping[str, Any], role: str) -> str:
    """Return the role for `_check_order`: an assistant turn with calls is `function_call`."""
    calls = message.get("tool_calls") or message.get("function_call")
    return "function_call" if calls and ROLE_NAMES[role] == "assistant" else role


def _either(message: Mapping[str, Any], key: str, other_key: str, what: str) -> Any:
    """Return the value of a key that has two spellings."""
    if key in message and other_key in message and message[key] != message[other_key]:
        raise RowError(
            f"`{key}` and `{other_key}` of a message in {what} differ",
            code="data.conflicting-keys",
        )
    return message.get(key, message.get(other_key))


def _to_message(raw: Mapping[str, Any], role: str, what: str) -> Message:
    content = _either(raw, "content", "value", what)
    message: Message = {"role": role}
    if role == "assistant" and not is_empty(raw.get("function_call")):
        raw = _with_call(raw, what)
    if content is None and raw.get("tool_calls"):
        content = ""
    if content is None:
        missing = "`refusal` but no" if raw.get("refusal") else "no"
        raise RowError(f"a message in {what} has {missing} `content`", code="data.missing-content")
    if isinstance(content, list):
        content, thought = _joined_parts(content, what)
        if thought:
            message["reasoning_content"] = thought
    message["content"] = check_text(content, f"the content of {what}")
    for key, value in raw.items():
        if key in MEDIA and not is_empty(value):
            raise RowError(
                f"a message in {what} has `{key}`; only text is supported",
                code="data.not-text",
            )
        if key == "reasoning_content" and message.get(key, value) != value:
            raise RowError(
                f"a message in {what} has thinking both in its content and in `{key}`",
                code="data.conflicting-thinking",
            )
        if key not in ("role", "from", "content", "value", *TRAIN_FLAGS):
            message[key] = value
    thoughts = {str(message[key]): key for key in THINKING if not is_empty(message.get(key))}
    if len(thoughts) > 1:
        names = " and ".join(f"`{key}`" for key in thoughts.values())
        raise RowError(f"{names} of a message in {what} differ", code="data.conflicting-thinking")
    if message.get("tool_calls"):
        message["tool_calls"] = _to_calls(message["tool_calls"], what)
    weight = _weight(raw, what)
    if role == "assistant" and weight is not None:
        message["weight"] = weight
    elif role != "assistant":  # never trained: a flag that requests it is reported as not read
        message |= {key: raw[key] for key in TRAIN_FLAGS if raw.get(key)}
    return message


def _with_call(raw: Mapping[str, Any], what: str) -> Row:
    """Convert OpenAI's legacy `function_call` to `tool_calls` with one call."""
    if raw.get("tool_calls"):
        raise RowError(
            f"a message in {what} has both `function_call` and `tool_calls`",
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
    """Return whether the turn is trained (1) or not (0); None without any of the keys."""
    flags = {key: raw[key] for key in TRAIN_FLAGS if key in raw}
    for key, value in flags.items():
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(
                f"`{key}` of a message in {what} is not 0 or 1", code="data.bad-train-flag"
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowError(
            f"{' and '.join(f'`{key}`' for key in flags)} of a message in {what} differ",
            code="data.conflicting-train-flags",
        )
    return next((int(value) for value in flags.values()), None)


def _joined_parts(parts: Sequence[Any], what: str) -> tuple[str, str]:
    """Join content in parts (OpenAI, Anthropic) into (text, thinking).

    Raises RowError: a part that is neither, or that has other fields.
    """
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    if not is_messages(parts):
        raise RowError(
            f"the content of a message in {what} is a list, not text", code="data.not-text"
        )
    for part in parts:
        fields = {key: value for key, value in part.items() if value is not None}
        kind = fields.pop("type", None)
        if kind == "reasoning":
            fields, kind = (
                {"thinking" if k == kind else k: v for k, v in fields.items()},
                "thinking",
            )
        if kind not in texts:
            raise RowError(
                f"the content of a message in {what} has a part of type {kind!r}; only text is supported",
                code="data.not-text",
            )
        if kind == "thinking":
            fields.setdefault("thinking", fields.pop("text", None))
        text = check_text(fields.pop(kind, None), f"a part of the content of {what}")
        if unknown := [key for key, value in fields.items() if not is_empty(value)]:
            raise RowError(
                f"a part of the content in {what} has the unknown field `{unknown[0]}`",
                code="data.unread-part",
            )
        texts[kind].append(text)
    return "".join(texts["text"]), "".join(texts["thinking"])


def _to_calls(calls: object, what: str) -> list[Row]:
    """Return tool calls with arguments as objects, which templates expect, instead of JSON text."""
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
    """Check the roles of a conversation joined from checked parts; it must start with a user turn.

    Raises RowError.
    """
    # Consecutive assistant turns were checked in their part, where calls are still recognizable.
    roles = ["function_call" if m["role"] == "assistant" else str(m["role"]) for m in messages]
    _check_order(roles, what)
    first = next((m["role"] for m in messages if m["role"] != "system"), "nobody")
    if first != "user":
        raise RowError(
            f"{what} starts with a turn of role {first}, not user", code="data.role-order"
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
        else:  # a call may follow text of the same turn; other assistant turns must alternate
            wrong = previous == role and "function_call" not in (raw, previous_raw)
        if wrong:
            raise RowError(
                f"the roles of {what} are out of order ({raw!r} as message {index + 1})",
                code="data.role-order",
            )
        previous, previous_raw = role, raw


def check_prompt_end(messages: Sequence[Message], what: str) -> None:
    """Check that the last turn of a prompt is one that a response can follow."""
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(
            f"{what} ends with a turn of role {messages[-1]['role']}, not user or tool",
            code="data.role-order",
        )
