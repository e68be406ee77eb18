"""Parts of a conversation put together: prompt and answers in every spelling that formats use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rpo_trainer.data.rows import (
    Message,
    Row,
    RowError,
    check_conversation,
    check_prompt_end,
    check_text,
    to_messages,
)

LAST_TURN = "\n\nAssistant:"  # how text-only preference data marks the turn that is compared
# How NVIDIA's data writes the turns of a conversation into one text.
MARKED_TURN = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n")


def sharegpt_messages(raw: Mapping[str, Any]) -> list[Message]:
    """The conversation of a row in ShareGPT's columns, with its `system` in front."""
    messages = to_messages(raw["conversations"], "`conversations`")
    system = raw.get("system")
    if system not in (None, "") and messages[0]["role"] != "system":
        return [{"role": "system", "content": check_text(system, "`system`")}, *messages]
    return messages


def alpaca_messages(raw: Mapping[str, Any]) -> list[Message]:
    """System, history and the question of a row in alpaca's columns; not the answer."""
    messages: list[Message] = []
    if raw.get("system") not in (None, ""):
        messages.append({"role": "system", "content": check_text(raw["system"], "`system`")})
    history = [] if raw.get("history") is None else raw["history"]
    pairs = isinstance(history, list) and all(isinstance(t, list) and len(t) == 2 for t in history)
    if not pairs:
        raise RowError("`history` is not a list of [question, answer]")
    for turn in history:
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": check_text(content, "`history`")})
    question = check_text(raw["instruction"], "`instruction`")
    if raw.get("input") not in (None, ""):
        question += "\n\n" + check_text(raw["input"], "`input`")
    return [*messages, {"role": "user", "content": question}]


def marked_messages(prompt: object) -> list[Message]:
    """Messages of a text whose turns begin with `<extra_id_1>User` and the like.

    Words in front of the first mark are the user's. An empty system turn, and the mark that a
    response is to follow, are left out.
    """
    first, *rest = MARKED_TURN.split(check_text(prompt, "`prompt`"))
    turns = [("User", first)] if first or not rest else []
    turns += zip(rest[::2], rest[1::2], strict=True)
    if len(turns) > 1 and turns[-1] == ("Assistant", ""):
        turns.pop()
    named = [{"role": role.lower(), "content": words} for role, words in turns]
    return [turn for turn in named if turn["content"] or turn["role"] != "system"]


def sft_completion(prompt: object, answer: object, name: str) -> Row:
    """An SFT row of prompt and answer, each a text or messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return {"prompt": check_text(prompt, "`prompt`"), "response": check_text(answer, name)}
    if isinstance(prompt, str):
        before: list[Message] = [{"role": "user", "content": check_text(prompt, "`prompt`")}]
    else:
        before = to_messages(prompt, "`prompt`")
    check_prompt_end(before, "`prompt`")
    if isinstance(answer, str):
        return {"messages": [*before, {"role": "assistant", "content": check_text(answer, name)}]}
    messages = [*before, *to_messages(answer, name)]
    check_conversation(messages, f"`prompt` and {name}")
    return {"messages": messages}


def preference(prompt: object, answers: Sequence[object], names: Sequence[str]) -> Row:
    """Prompt and response texts of a preference row; the prompts that come with the answers agree.

    Raises RowError.
    """
    split = [_split(prompt, answer, name) for answer, name in zip(answers, names, strict=True)]
    if not split:
        return {"prompt": "", "responses": []}
    first = split[0][0]
    if any(before != first for before, _ in split):
        raise RowError(f"the prompts of {names[0]} and of another response differ")
    return {"prompt": first, "responses": [response for _, response in split]}


def _split(prompt: object, answer: object, name: str) -> tuple[str | list[Message], str]:
    if isinstance(answer, str):
        response = check_text(answer, name)
        if isinstance(prompt, str):
            return check_text(prompt, "`prompt`"), response
        if prompt is None:
            raise RowError(f"`prompt` is absent, and {name} is text without one")
        before = to_messages(prompt, "`prompt`")
    else:
        turns = to_messages([answer] if isinstance(answer, Mapping) else answer, name)
        if turns[-1]["role"] != "assistant":
            raise RowError(f"{name} does not end with a turn of the assistant")
        if turns[-1].get("tool_calls"):
            raise RowError(f"{name} ends with `tool_calls`; a response to compare must be text")
        before, response = _joined(prompt, turns[:-1], name), turns[-1]["content"]
    check_conversation(before, f"the prompt of {name}")
    check_prompt_end(before, f"the prompt of {name}")
    return before, response


def _joined(prompt: object, lead: list[Message], name: str) -> list[Message]:
    """The prompt, and what an answer brings in front of its last turn: that may repeat it."""
    if prompt is None:
        if not lead:
            raise RowError(f"`prompt` is absent, and {name} has no turn before the last")
        return lead
    if isinstance(prompt, str):
        if any(message["role"] == "user" for message in lead):
            return lead
        return [*lead, {"role": "user", "content": check_text(prompt, "`prompt`")}]
    given = to_messages(prompt, "`prompt`")
    return lead if lead[: len(given)] == given else given + lead


def implicit_text_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: the prompt is what they share in front.

    It ends behind the last "Assistant:" they share, else before a whole word: "The sky is" of
    "The sky is blue" and "The sky is bright".
    """
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    marker = chosen.rfind(LAST_TURN, 0, shared)
    if marker >= 0:
        end = marker + len(LAST_TURN)
    else:
        blanks = [match.start() for match in re.finditer(r"\s", chosen[: shared + 1])]
        end = blanks[-1] if blanks else 0
    if not chosen[:end].strip():
        raise RowError("`prompt` is absent, and `chosen` and `rejected` share no beginning")
    return chosen[:end], chosen[end:], rejected[end:]
