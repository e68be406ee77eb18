"""Convert rows to requests: messages of OpenAI's chat API, or text for a judge."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpo_trainer.data.messages import TRAIN_FLAGS
from rpo_trainer.data.rows import THINKING, Message, Row, is_empty, response_message
from rpo_trainer.recipe.template_kwargs import COLUMN

if TYPE_CHECKING:
    from rpo_trainer.recipe import EndpointSpec

logger = logging.getLogger(__name__)

_SENT = ("role", "content", "name", "tool_call_id")  # unchanged
# Training flags are meaningless to a server.
_KNOWN = frozenset({*_SENT, "tool_calls", *THINKING, *TRAIN_FLAGS})


def chat_messages(messages: Sequence[Message]) -> list[Message]:
    """Convert messages to the keys of OpenAI's API, with thinking as `reasoning_content`.

    The arguments of tool calls become JSON text. Calls without an id get one, and so do the tool turns
    that answer them, in order.
    """
    sent = []
    calls = 0
    unanswered: list[str] = []
    for message in messages:
        new = {key: message[key] for key in _SENT if key in message}
        if thought := _thinking(message):
            new["reasoning_content"] = thought
        if message.get("tool_calls"):
            new["tool_calls"] = [
                _sent_call(call, f"call_{calls + n}")
                for n, call in enumerate(message["tool_calls"])
            ]
            calls += len(new["tool_calls"])
            unanswered = [call["id"] for call in new["tool_calls"]]
        elif message["role"] == "tool" and unanswered:
            answered = new.setdefault("tool_call_id", unanswered[0])
            unanswered = [call for call in unanswered if call != answered]
        sent.append(new)
    return sent


def scored_conversation(row: Row, number: int) -> tuple[list[Message], dict[str, Any]]:
    """Return prompt and one response of a row as messages, and the request options for its tools.

    The answer is a score, so tool calls are disabled.
    """
    prompt = row["prompt"]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tools = {"tools": row["tools"], "tool_choice": "none"} if row.get("tools") else {}
    return chat_messages([*before, response_message(row, number)]), tools


def template_options(spec: EndpointSpec, row: Row | None) -> dict[str, Any]:
    """Return `chat_template_kwargs` as options of a chat request to vLLM or SGLang; {} for none.

    Args:
        spec: the endpoint, whose own variables take precedence.
        row: its variables are sent if the endpoint has none; None: no row.
    """
    kwargs = spec.chat_template_kwargs
    if kwargs is None:
        kwargs = row.get(COLUMN) if row is not None else None
    return {"extra_body": {COLUMN: dict(kwargs)}} if kwargs else {}


def prompt_text(row: Row) -> str:
    """Return the prompt of a row as text, preceded by its tools."""
    prompt, tools = row["prompt"], row.get("tools")
    turns = [prompt] if isinstance(prompt, str) else map(_turn, prompt)
    listed = ["\n".join(["Tools:", *map(_json, tools)])] if tools else []
    return "\n\n".join([*listed, *turns])


def response_text(row: Row, number: int) -> str:
    """Return a response of a row as text."""
    return _said(response_message(row, number))


def warn_unsent(
    rows: Sequence[Row],
    where: str,
    *,
    completions: bool = False,
    documents: bool = True,
    tools: bool = True,
    variables: bool = True,
) -> None:
    """Log one warning that lists the content of rows that is not sent, with counts.

    Args:
        rows: the rows.
        where: the endpoint.
        completions: whether text prompts go to the completions API, which accepts neither tools nor variables
            of a chat template.
        documents: whether `documents` among a row's variables are sent.
        tools: whether a row's tools are sent.
        variables: whether a row's variables of the chat template are sent.
    """
    counts = Counter(name for row in rows for name in _unsent(row, completions, documents))
    counts += Counter("`tools`" for row in rows if row.get("tools") and not tools)
    counts += Counter(f"`{COLUMN}`" for row in rows if row.get(COLUMN) and not variables)
    if counts:
        logger.warning(
            "%s: not sent to the server: %s (of %d rows)",
            where,
            ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())),
            len(rows),
        )


def _unsent(row: Row, completions: bool, documents: bool) -> set[str]:
    text = isinstance(row["prompt"], str)
    messages = [*([] if text else row["prompt"]), *(row.get("response_fields") or ())]
    found = {
        f"the key `{key}` of messages"
        for message in messages
        for key, value in message.items()
        if key not in _KNOWN and not is_empty(value)
    }
    if row.get("special_tokens"):
        found.add("`special_tokens`")
    if text and completions and row.get("tools"):
        found.add("`tools` of a text prompt")
    given = row.get(COLUMN) or {}
    if given.get("documents") and not documents:
        found.add(f"`documents` of `{COLUMN}`")
    if given and text and completions:
        found.add(f"`{COLUMN}` of a text prompt")
    return found


def _turn(message: Message) -> str:
    name = f" {message['name']}" if message.get("name") else ""
    return f"{message['role'].capitalize()}{name}: {_said(message)}"


def _said(message: Message) -> str:
    thought = _thinking(message)
    parts = [f"<thinking>\n{thought}\n</thinking>"] if thought else []
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    if message["content"] or not (parts or calls):
        parts.append(message["content"])
    parts += [f"Tool call: {name}({arguments})" for name, arguments in calls]
    return "\n\n".join(parts)


def _thinking(message: Message) -> str:
    thought = next((message[key] for key in THINKING if not is_empty(message.get(key))), "")
    return thought if isinstance(thought, str) else _json(thought)


def _call(call: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a tool call and its arguments as JSON."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return str(function.get("name", "")), (
        arguments if isinstance(arguments, str) else _json(arguments)
    )


def _sent_call(call: Mapping[str, Any], default_id: str) -> dict[str, Any]:
    name, arguments = _call(call)
    return {
        "id": call.get("id") or default_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
