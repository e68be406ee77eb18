"""Seven conversations for checking how a chat template renders trained turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.rows import Message


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
        name: the feature that it checks.
        tools: function descriptions.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def row(self) -> dict[str, Any]:
        """Return it as an SFT row."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"id": self.name, "source": "samples", "messages": list(self.messages), **tools}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _said(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def _call(city: str, number: int) -> dict[str, Any]:
    # Nine letters and digits: some templates refuse other ids.
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": f"sample00{number}", "type": "function", "function": function}


def _result(text: str, number: int) -> Message:
    return {
        "role": "tool", "name": "get_weather", "tool_call_id": f"sample00{number}", "content": text,
    }  # fmt: skip


_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city."}},
                "required": ["city"],
            },
        },
    },
)
_ASKED = _user("Is it warmer in Oslo or in Rome?")
_OSLO, _ROME = _result("4 degrees", 1), _result("17 degrees", 2)

SAMPLES = (
    Sample("plain", (_user("What is two plus three?"), _said("Five."))),
    Sample(
        "system",
        (
            {"role": "system", "content": "Answer in one word."},
            _user("What color is the sky?"),
            _said("Blue."),
        ),
    ),
    Sample(
        "several turns",
        (
            _user("Name a river."),
            _said("The Rhine."),
            _user("And a lake?"),
            _said("Lake Geneva."),
            _user("Thanks!"),
            _said("You are welcome."),
        ),
    ),
    Sample(
        "thinking",
        (
            _user("What is 17 times 3?"),
            _said("51", reasoning_content="17 times 3 is 30 plus 21."),
        ),
    ),
    Sample(
        "tool call without text",
        (_user("Is it cold in Oslo?"), _said("", tool_calls=[_call("Oslo", 1)])),
        _TOOLS,
    ),
    Sample(
        "tool call with text, result and answer",
        (
            _user("Is it cold in Oslo?"),
            _said("Let me look.", tool_calls=[_call("Oslo", 1)]),
            _OSLO,
            _said("Yes, it has 4 degrees."),
        ),
        _TOOLS,
    ),
    Sample(
        "thinking before and between tool calls",
        (
            _ASKED,
            _said("", reasoning_content="Oslo first.", tool_calls=[_call("Oslo", 1)]),
            _OSLO,
            _said("", reasoning_content="Now Rome.", tool_calls=[_call("Rome", 2)]),
            _ROME,
            _said("In Rome, by 13 degrees.", reasoning_content="17 less 4 is 13."),
        ),
        _TOOLS,
    ),
)
