"""SFT formats."""

from __future__ import annotations

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.conversation import (
    WITH_INSTRUCTION,
    alpaca_messages,
    marked_messages,
    sft_completion,
    sharegpt_messages,
)
from rpo_trainer.data.formats.spec import Format, Raw
from rpo_trainer.data.messages import check_conversation, to_messages
from rpo_trainer.data.rows import Message, Row, RowError, check_text


def _whole(messages: list[Message], what: str) -> Row:
    check_conversation(messages, what)
    if all(message["role"] != "assistant" for message in messages):
        raise RowError(f"{what} has no assistant turn to train on", code="data.no-assistant-turn")
    return {"messages": messages}


def _messages(raw: Raw) -> Row:
    return _whole(to_messages(raw["messages"], "`messages`"), "`messages`")


def _prompt_response(raw: Raw) -> Row:
    return sft_completion(raw["prompt"], raw["response"], "`response`")


def _prompt_completion(raw: Raw) -> Row:
    return sft_completion(raw["prompt"], raw["completion"], "`completion`")


def _helpsteer2_sft(raw: Raw) -> Row:
    return sft_completion(marked_messages(raw["prompt"]), raw["response"], "`response`")


def _text(raw: Raw) -> Row:
    return {"prompt": "", "response": check_text(raw["text"], "`text`")}


def _alpaca(raw: Raw) -> Row:
    answer = {"role": "assistant", "content": check_text(raw["output"], "`output`")}
    return {"messages": [*alpaca_messages(raw), answer]}


def _sharegpt(raw: Raw) -> Row:
    return _whole(sharegpt_messages(raw), "`conversations`")


_RATED = ("prompt", "response")

# In the order of detection, the most specific columns first.
SFT_FORMATS: dict[str, Format] = {
    "messages": Format("sft", ("messages",), (), _messages),
    "sharegpt": Format("sft", ("conversations",), ("mask",), _sharegpt),
    "helpsteer2_sft": Format(
        "sft",
        (*_RATED, *HELPSTEER_ATTRIBUTES),
        (),
        _helpsteer2_sft,
        nullable=HELPSTEER_ATTRIBUTES,
    ),
    "prompt_response": Format("sft", ("prompt", "response"), (), _prompt_response),
    "prompt_completion": Format("sft", ("prompt", "completion"), (), _prompt_completion),
    "alpaca": Format("sft", ("instruction", "output"), WITH_INSTRUCTION, _alpaca),
    "text": Format("sft", ("text",), (), _text),
}
