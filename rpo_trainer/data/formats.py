"""The known formats: for each its columns, and a function from a raw row to internal fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.conversation import (
    alpaca_messages,
    implicit_text_pair,
    preference,
    sft_completion,
    sharegpt_messages,
)
from rpo_trainer.data.rows import (
    Kind,
    Message,
    Row,
    RowError,
    check_conversation,
    check_prompt_end,
    check_text,
    reward_fault,
    to_messages,
)

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One known format.

    Attributes:
        kind: rows it gives.
        required: columns that every row must have, not null; those it is known by.
        optional: columns it also reads.
        convert: raw row → fields of an internal row (without id and source); raises RowError.
        sort: put the responses in the order of their rewards (a pair's chosen stays first).
    """

    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Raw], Row]
    sort: bool = False


# Read for every format, beside its own columns.
COMMON = ("id", "source", "tools", "ground_truth", "truth_chosen")

# ---------------------------------------------------------------- SFT


def _whole(messages: list[Message], what: str) -> Row:
    check_conversation(messages, what)
    if all(message["role"] != "assistant" for message in messages):
        raise RowError(f"{what} has no turn of the assistant to train on")
    return {"messages": messages}


def _messages(raw: Raw) -> Row:
    return _whole(to_messages(raw["messages"], "`messages`"), "`messages`")


def _prompt_response(raw: Raw) -> Row:
    return sft_completion(raw["prompt"], raw["response"], "`response`")


def _prompt_completion(raw: Raw) -> Row:
    return sft_completion(raw["prompt"], raw["completion"], "`completion`")


def _text(raw: Raw) -> Row:
    return {"prompt": "", "response": check_text(raw["text"], "`text`")}


def _alpaca(raw: Raw) -> Row:
    answer = {"role": "assistant", "content": check_text(raw["output"], "`output`")}
    return {"messages": [*alpaca_messages(raw), answer]}


def _sharegpt(raw: Raw) -> Row:
    return _whole(sharegpt_messages(raw), "`conversations`")


# ---------------------------------------------------------------- preferences


def _pairs(raw: Raw) -> Row:
    chosen, rejected = raw["chosen"], raw["rejected"]
    prompt = raw.get("prompt")
    if prompt is None and raw.get("conversations") is not None:
        prompt = sharegpt_messages(raw)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = implicit_text_pair(chosen, rejected)
    row = preference(prompt, [chosen, rejected], ["`chosen`", "`rejected`"])
    return {**row, "rewards": [raw.get("chosen_reward"), raw.get("rejected_reward")]}


def _ultrafeedback(raw: Raw) -> Row:
    scores = {"chosen_reward": raw["score_chosen"], "rejected_reward": raw["score_rejected"]}
    return _pairs({**raw, **scores})


def _nemo(raw: Raw) -> Row:
    names = ["chosen_response", "rejected_response"]
    row = preference(raw["prompt"], [raw[name] for name in names], [f"`{n}`" for n in names])
    return {**row, "rewards": [raw.get("chosen_reward"), raw.get("rejected_reward")]}


def _helpsteer3(raw: Raw) -> Row:
    value = raw["overall_preference"]
    if reward_fault(value) or not -3 <= value <= 3:
        raise RowError("`overall_preference` is not a number from -3 to 3")
    # Negative: response1 is better. The gap is the strength of the preference.
    answers = [raw["response1"], raw["response2"]]
    names = ["`response1`", "`response2`"]
    if value > 0:
        answers.reverse()
        names.reverse()
    return {
        **preference(raw["context"], answers, names),
        "rewards": [abs(value) / 2, -abs(value) / 2],
    }


def _responses(raw: Raw) -> Row:
    answers = raw["responses"]
    if not isinstance(answers, list):
        raise RowError("`responses` is not a list")
    return preference(raw["prompt"], answers, [f"`responses`[{i}]" for i in range(len(answers))])


def _scored_responses(raw: Raw) -> Row:
    rewards = raw["rewards"]
    if not isinstance(rewards, list) or len(rewards) != len(raw["responses"]):
        raise RowError("`rewards` is not a list with one reward a response")
    return {**_responses(raw), "rewards": list(rewards)}


def _ranked(raw: Raw) -> Row:
    row = _responses(raw)
    ranks = raw.get("ranks")
    if ranks is not None:
        if not isinstance(ranks, list) or len(ranks) != len(row["responses"]):
            raise RowError("`ranks` is not a list with one rank a response")
        if any(reward_fault(rank) for rank in ranks):
            raise RowError("`ranks` are not all numbers")
        order = sorted(range(len(ranks)), key=lambda i: ranks[i])
        row["responses"] = [row["responses"][i] for i in order]
    return {**row, "rewards": [None] * len(row["responses"])}


# ---------------------------------------------------------------- prompts


def _prompt(raw: Raw) -> Row:
    prompt = raw["prompt"]
    if isinstance(prompt, str):
        return {"prompt": check_text(prompt, "`prompt`")}
    return {"prompt": _open_conversation(to_messages(prompt, "`prompt`"))}


def _prompt_of(messages: Callable[[Raw], list[Message]]) -> Callable[[Raw], Row]:
    """The prompt of a whole conversation: all before the last assistant turn."""

    def convert(raw: Raw) -> Row:
        found = messages(raw)
        ends = [i for i, message in enumerate(found) if message["role"] == "assistant"]
        return {"prompt": _open_conversation(found[: ends[-1]] if ends else found)}

    return convert


def _open_conversation(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RowError("there is no turn in front of the response")
    check_conversation(messages, "the prompt")
    check_prompt_end(messages, "the prompt")
    return messages


_SHAREGPT = ("system",)
_REWARDS = ("chosen_reward", "rejected_reward")

# In the order in which they are tried: the more telling columns first.
FORMATS: dict[str, Format] = {
    "responses": Format(
        "pair", ("prompt", "responses", "rewards"), (), _scored_responses, sort=True
    ),
    "ranked": Format("pair", ("prompt", "responses"), ("ranks",), _ranked),
    "nemo": Format("pair", ("prompt", "chosen_response", "rejected_response"), _REWARDS, _nemo),
    "helpsteer3": Format(
        "pair", ("context", "response1", "response2", "overall_preference"), (), _helpsteer3
    ),
    "ultrafeedback_binarized": Format(
        "pair",
        ("chosen", "rejected", "score_chosen", "score_rejected"),
        ("prompt",),
        _ultrafeedback,
    ),
    "pairs": Format(
        "pair", ("chosen", "rejected"), ("prompt", "conversations", "system", *_REWARDS), _pairs
    ),
    "messages": Format("sft", ("messages",), (), _messages),
    "sharegpt": Format("sft", ("conversations",), _SHAREGPT, _sharegpt),
    "prompt_response": Format("sft", ("prompt", "response"), (), _prompt_response),
    "prompt_completion": Format("sft", ("prompt", "completion"), (), _prompt_completion),
    "alpaca": Format("sft", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    "text": Format("sft", ("text",), (), _text),
}
PROMPT_FORMATS: dict[str, Format] = {
    "prompt": Format("prompt", ("prompt",), (), _prompt),
    "messages": Format(
        "prompt",
        ("messages",),
        (),
        _prompt_of(lambda raw: to_messages(raw["messages"], "`messages`")),
    ),
    "sharegpt": Format("prompt", ("conversations",), _SHAREGPT, _prompt_of(sharegpt_messages)),
    "alpaca": Format(
        "prompt", ("instruction",), ("input", "system", "history"), _prompt_of(alpaca_messages)
    ),
}
