"""Prompt formats, for stages that sample the responses."""

from __future__ import annotations

from collections.abc import Callable

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.conversation import (
    WITH_INSTRUCTION,
    alpaca_messages,
    marked_messages,
    sharegpt_messages,
)
from rpo_trainer.data.formats.spec import Format, Raw
from rpo_trainer.data.messages import check_conversation, check_prompt_end, to_messages
from rpo_trainer.data.rows import Message, Row, RowError, check_text


def _prompt(raw: Raw) -> Row:
    prompt = raw["prompt"]
    if isinstance(prompt, str):
        return {"prompt": check_text(prompt, "`prompt`")}
    return {"prompt": _open_conversation(to_messages(prompt, "`prompt`"))}


def _helpsteer2_prompt(raw: Raw) -> Row:
    return {"prompt": _open_conversation(marked_messages(raw["prompt"]))}


def _prompt_of(messages: Callable[[Raw], list[Message]]) -> Callable[[Raw], Row]:
    """Return a converter whose prompt is the conversation without its final assistant turns."""

    def convert(raw: Raw) -> Row:
        found = messages(raw)
        while found and found[-1]["role"] == "assistant":
            found.pop()
        return {"prompt": _open_conversation(found)}

    return convert


def _open_conversation(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RowError("there is no turn before the response", code="data.missing-prompt")
    check_conversation(messages, "the prompt")
    check_prompt_end(messages, "the prompt")
    return messages


# In the order of detection, the most specific columns first.
PROMPT_FORMATS: dict[str, Format] = {
    "helpsteer2": Format(
        "prompt",
        ("prompt", *HELPSTEER_ATTRIBUTES),
        (),
        _helpsteer2_prompt,
        nullable=HELPSTEER_ATTRIBUTES,
    ),
    "prompt": Format("prompt", ("prompt",), (), _prompt),
    "messages": Format(
        "prompt",
        ("messages",),
        (),
        _prompt_of(lambda raw: to_messages(raw["messages"], "`messages`")),
    ),
    "sharegpt": Format("prompt", ("conversations",), ("mask",), _prompt_of(sharegpt_messages)),
    "alpaca": Format("prompt", ("instruction",), WITH_INSTRUCTION, _prompt_of(alpaca_messages)),
}
