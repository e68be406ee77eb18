"""Build conversations from prompts and responses in the forms that formats use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.messages import check_conversation, check_prompt_end, is_messages, to_messages
from rpo_trainer.data.rows import Message, Row, RowError, check_text, extra_message_fields, is_blank

# Markers of an assistant turn in a conversation stored as one text: a name and a colon at the beginning of a
# line, a heading, or the tokens of a chat template.
LAST_TURN = re.compile(
    r"\n[ \t]*(?:Assistant|ASSISTANT|assistant|AI|Bot|GPT):"
    r"|\n#{1,6} ?(?:Assistant|Response):?[ \t]*\n?"
    r"|<\|im_start\|>assistant\n|<\|assistant\|>\n?|<start_of_turn>model\n|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<extra_id_1>Assistant\n"
)
# Columns that may hold the prompt of a pair, in order of precedence; `input` and `history` extend
# `instruction`.
PROMPT_COLUMNS = ("prompt", "conversations", "messages", "trajectory", "instruction")
WITH_INSTRUCTION = ("input", "history")
# Turn markers of NVIDIA's data, which store a conversation as one text.
MARKED_TURN = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n")


def sharegpt_messages(raw: Mapping[str, Any]) -> list[Message]:
    """Return the conversation of a row with ShareGPT columns.

    NeMo's `mask` names the role that is not trained. User turns never are.
    """
    if str(raw.get("mask") or "User").lower() not in ("user", "human"):
        raise RowError(
            "`mask` is not `User`; only assistant turns can be trained on",
            code="data.unsupported-mask",
        )
    return to_messages(raw["conversations"], "`conversations`")


def with_system(row: Row, system: str, what: str) -> bool:
    """Prepend the system prompt of a row's column `system` to its conversation or prompt text.

    Returns whether this was possible: a row that is a single text without a prompt has no system prompt.

    Raises RowError: the conversation begins with a different system prompt.
    """
    name = "prompt" if "prompt" in row else "messages"
    if isinstance(row[name], str):
        if not row[name]:
            return False
        rest = row[name].removeprefix(system)
        if rest == row[name] or (not rest.startswith(("\n", "\r")) and rest):
            row[name] = f"{system}\n\n{row[name]}"
        return True
    first = row[name][0] if row[name] else {"role": "user"}
    if first["role"] != "system":
        row[name] = [{"role": "system", "content": system}, *row[name]]
    elif _words(first["content"]) != _words(system):
        raise RowError(
            f"`system` and the system turn of {what} differ", code="data.conflicting-system"
        )
    return True


def _words(text: str) -> str:
    return " ".join(text.split())


def alpaca_messages(raw: Mapping[str, Any]) -> list[Message]:
    """Return the history and the question of a row with Alpaca columns, without the answer."""
    messages: list[Message] = []
    history = [] if raw.get("history") is None else raw["history"]
    pairs = isinstance(history, list) and all(isinstance(t, list) and len(t) == 2 for t in history)
    if not pairs:
        raise RowError("`history` is not a list of [question, answer]", code="data.wrong-type")
    for turn in history:
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": check_text(content, "`history`")})
    question = check_text(raw["instruction"], "`instruction`")
    if raw.get("input") not in (None, ""):
        question += "\n\n" + check_text(raw["input"], "`input`")
    return [*messages, {"role": "user", "content": question}]


def marked_messages(prompt: object) -> list[Message]:
    """Split a text whose turns begin with `<extra_id_1>User` and similar markers into messages.

    Text before the first marker is the user's. An empty system turn and a final assistant marker are omitted.
    """
    first, *rest = MARKED_TURN.split(check_text(prompt, "`prompt`"))
    turns = [("User", first)] if first or not rest else []
    turns += zip(rest[::2], rest[1::2], strict=True)
    if len(turns) > 1 and turns[-1] == ("Assistant", ""):
        turns.pop()
    named = [{"role": role.lower(), "content": words} for role, words in turns]
    return [turn for turn in named if turn["content"] or turn["role"] != "system"]


def sft_completion(prompt: object, answer: object, name: str) -> Row:
    """Return an SFT row of a prompt and an answer, each a text or messages."""
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
    """Return prompt and responses of a preference row; prompts contained in the answers must be equal.

    `unread` names a text prompt that the conversations of the answers do not contain.

    Raises RowError.
    """
    if not answers:
        return {"prompt": "", "responses": []}
    split = [_split(prompt, answer, name) for answer, name in zip(answers, names, strict=True)]
    first = split[0].prompt
    if any(each.prompt != first for each in split):
        raise RowError(
            f"the prompt of {names[0]} differs from that of another response",
            code="data.different-prompts",
        )
    row: Row = {"prompt": first, "responses": [each.response for each in split]}
    if any(each.fields for each in split):
        row["response_fields"] = [each.fields for each in split]
    if isinstance(prompt, str) and not isinstance(first, str) and not holds(first, prompt):
        row["unread"] = ["prompt"]
    return row


@dataclass(frozen=True)
class _Split:
    """Prompt and text of one answer, and the other fields of its message (thinking, for example)."""

    prompt: str | list[Message]
    response: str
    fields: dict[str, Any]


def _split(prompt: object, answer: object, name: str) -> _Split:
    fields: dict[str, Any] = {}
    if isinstance(answer, str):
        response = check_text(answer, name)
        if isinstance(prompt, str):
            return _Split(check_text(prompt, "`prompt`"), response, fields)
        if prompt is None:
            raise RowError(
                f"`prompt` is missing, and {name} is text without one", code="data.missing-prompt"
            )
        before = to_messages(prompt, "`prompt`")
    else:
        turns = to_messages([answer] if isinstance(answer, Mapping) else answer, name)
        if turns[-1]["role"] != "assistant":
            raise RowError(
                f"{name} does not end with an assistant turn", code="data.no-assistant-turn"
            )
        if turns[-1].get("tool_calls"):
            raise RowError(
                f"{name} ends with a tool call (`tool_calls` or `function_call`); chosen and rejected "
                "responses must be text",
                code="data.tool-call-response",
            )
        if turns[-1].get("weight") == 0:
            raise RowError(
                f"the last turn of {name}, which is the response, has weight 0",
                code="data.untrained-response",
            )
        before, response = _joined(prompt, turns[:-1], name), turns[-1]["content"]
        fields = extra_message_fields(turns[-1])
    check_conversation(before, f"the prompt of {name}")
    check_prompt_end(before, f"the prompt of {name}")
    return _Split(before, response, fields)


def _joined(prompt: object, answer_turns: list[Message], name: str) -> list[Message]:
    """Join the prompt and the turns before the last turn of an answer, which may repeat the prompt."""
    if prompt is None:
        if not answer_turns:
            raise RowError(
                f"`prompt` is missing, and {name} has only one turn",
                code="data.missing-prompt",
            )
        return answer_turns
    if isinstance(prompt, str):
        if has_user(answer_turns):
            return answer_turns
        return [*answer_turns, {"role": "user", "content": check_text(prompt, "`prompt`")}]
    prompt_turns = to_messages(prompt, "`prompt`")
    system, turns = _system_apart(prompt_turns)
    own_system, own_turns = _system_apart(answer_turns)
    if own_turns[: len(turns)] != turns:
        return prompt_turns + answer_turns
    if system and own_system and system != own_system:
        raise RowError(
            f"the system turns of `prompt` and {name} differ", code="data.conflicting-system"
        )
    return [*(system or own_system), *own_turns]


def _system_apart(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split off the system turn, if there is one."""
    begin = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:begin], messages[begin:]


def has_user(messages: Sequence[Message]) -> bool:
    """Whether there is a user turn."""
    return any(message["role"] == "user" for message in messages)


def holds(messages: Sequence[Message], text: str) -> bool:
    """Whether one of the turns contains a text, ignoring white space."""
    return any(_words(text) in _words(message["content"]) for message in messages)


def pair_prompt(raw: Mapping[str, Any], answers: Sequence[object]) -> tuple[object, list[str]]:
    """Return the prompt of a pair (None: it is in the answers), and the columns that are not read.

    The prompt is the first of PROMPT_COLUMNS that has a value. If the answers are full conversations, only
    `prompt` is read; the other columns may repeat them.

    Raises RowError.
    """
    column = next((name for name in PROMPT_COLUMNS if raw.get(name) is not None), None)
    if column in (None, "prompt"):
        return raw.get("prompt"), []
    prompt: str | list[Message]
    if column == "instruction":
        prompt = alpaca_messages(raw)
    elif isinstance(raw[column], str):
        prompt = [{"role": "user", "content": check_text(raw[column], f"`{column}`")}]
    elif column == "conversations":
        prompt = sharegpt_messages(raw)
    else:
        prompt = to_messages(raw[column], f"`{column}`")
    if not all(map(_is_full_conversation, answers)):
        return prompt, []
    turns = [m for answer in answers for m in to_messages(answer, "an answer")]
    repeated = all(holds(turns, message["content"]) for message in prompt)
    return None, [] if repeated else [column]


def _is_full_conversation(answer: object) -> bool:
    """Whether an answer is a full conversation, with a user turn."""
    return is_messages(answer) and has_user(to_messages(answer, "an answer"))


def implicit_text_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts with a common beginning into (prompt, chosen, rejected).

    The prompt ends at the last common assistant marker ("\n\nAssistant:"), so that words that both answers
    happen to begin with are not part of it.

    Raises RowError: the common beginning contains no marker.
    """
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    turns = [match for match in LAST_TURN.finditer(chosen) if match.end() <= shared]
    ends = [turn.end() for turn in turns if not is_blank(chosen[: turn.start()])]
    if not ends:
        raise RowError(
            "`prompt` is missing, and `chosen` and `rejected` have no common beginning that ends with an "
            "assistant marker (`Assistant:`)",
            code="data.missing-prompt",
        )
    return chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :]
