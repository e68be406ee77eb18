"""Rows as a server gets them: messages of OpenAI's chat interface, or text for a judge."""

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

_SENT = ("role", "content", "name", "tool_call_id")  # as they are
# Flags of training say nothing to a server.
_KNOWN = frozenset({*_SENT, "tool_calls", *THINKING, *TRAIN_FLAGS})


def chat_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with the keys of OpenAI's interface, and thinking as `reasoning_content`.

    The arguments of tool calls are JSON text. Calls without an id get one, and so do the turns of the
    tools that answer them, in their order.
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
    """Prompt and one response of a row as messages, and its tools as options of the request.

    The answer to it is a score, so no tool may be called.
    """
    prompt = row["prompt"]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tools = {"tools": row["tools"], "tool_choice": "none"} if row.get("tools") else {}
    return chat_messages([*before, response_message(row, number)]), tools


def template_options(spec: EndpointSpec, row: Row | None) -> dict[str, Any]:
    """`chat_template_kwargs` as vLLM and SGLang take them: options of a chat request, {} for none.

    Args:
        row: its own are sent where the endpoint has none of its own; None: it has none.
    """
    given = spec.chat_template_kwargs
    if given is None:
        given = row.get(COLUMN) if row is not None else None
    return {"extra_body": {COLUMN: dict(given)}} if given else {}


def prompt_text(row: Row) -> str:
    """The prompt of a row as a judge reads it, after the tools it has."""
    prompt, tools = row["prompt"], row.get("tools")
    turns = [prompt] if isinstance(prompt, str) else map(_turn, prompt)
    listed = ["\n".join(["Tools:", *map(_json, tools)])] if tools else []
    return "\n\n".join([*listed, *turns])


def response_text(row: Row, number: int) -> str:
    """A response of a row as a judge reads it."""
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
    """One warning about what rows say and a server is not told, with counts of rows.

    Args:
        completions: prompts that are text go to the completions interface, which takes neither tools
            nor variables of a chat template.
        documents: `documents` among the variables of a row are sent.
        tools: the tools of a row are sent.
        variables: the variables of the chat template of a row are sent.
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
        found.add("`tools` of a prompt that is text")
    given = row.get(COLUMN) or {}
    if given.get("documents") and not documents:
        found.add(f"`documents` of `{COLUMN}`")
    if given and text and completions:
        found.add(f"`{COLUMN}` of a prompt that is text")
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
    """Name and arguments of a tool call, the latter as JSON."""
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
