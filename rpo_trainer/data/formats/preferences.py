"""Preference formats: two or more responses to a prompt, best first or with rewards."""

from __future__ import annotations

from collections.abc import Mapping

from rpo_trainer.data.conversation import (
    PROMPT_COLUMNS,
    WITH_INSTRUCTION,
    implicit_text_pair,
    marked_messages,
    pair_prompt,
    preference,
)
from rpo_trainer.data.formats.spec import Format, Raw
from rpo_trainer.data.messages import is_messages, to_messages
from rpo_trainer.data.rows import Row, RowError, check_text, reward_fault, with_responses
from rpo_trainer.data.shared_columns import tools


def _finished(raw: Raw, count: int) -> Row:
    """Return the flags of complete (not truncated) responses, written by `generate`; empty if absent."""
    flags = raw.get("finished")
    if flags is None:
        return {}
    if not isinstance(flags, list):  # a column of the same name with another meaning
        return {"unread": ["finished"]}
    if len(flags) != count or not all(isinstance(flag, bool) for flag in flags):
        raise RowError(
            "`finished` is not a list with one boolean for each response", code="data.wrong-type"
        )
    return {"finished": flags}


def _pairs(raw: Raw) -> Row:
    chosen, rejected = raw["chosen"], raw["rejected"]
    prompt, unread = pair_prompt(raw, [chosen, rejected])
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = implicit_text_pair(chosen, rejected)
    row = preference(prompt, [chosen, rejected], ["`chosen`", "`rejected`"])
    ended = _finished(raw, 2)
    row["unread"] = [*row.get("unread", ()), *unread, *ended.pop("unread", ())]
    return {**row, **ended, "rewards": [raw.get("chosen_reward"), raw.get("rejected_reward")]}


def _margin(raw: Raw) -> Row:
    # Only the reward gap is given; the rewards themselves are arbitrary, as in HelpSteer3.
    half = None if reward_fault(raw["margin"]) else raw["margin"] / 2
    return {**_pairs(raw), "rewards": [half, None if half is None else -half]}


def _orca(raw: Raw) -> Row:
    question = {"role": "user", "content": check_text(raw["question"], "`question`")}
    return _pairs({**raw, "prompt": [question]})


def _ultrafeedback(raw: Raw) -> Row:
    scores = {"chosen_reward": raw["score_chosen"], "rejected_reward": raw["score_rejected"]}
    return _pairs({**raw, **scores})


def _nemo(raw: Raw) -> Row:
    names = ["chosen_response", "rejected_response"]
    prompt, answers = raw["prompt"], [raw[name] for name in names]
    if isinstance(prompt, str) and prompt.startswith("<extra_id_0>System\n"):
        prompt = marked_messages(prompt)
        answers = [
            answer.removesuffix("\n<extra_id_1>") if isinstance(answer, str) else answer
            for answer in answers
        ]
    row = preference(prompt, answers, [f"`{n}`" for n in names])
    return {**row, "rewards": [raw.get("chosen_reward"), raw.get("rejected_reward")]}


def _nemo_rl(raw: Raw) -> Row:
    completions = raw["completions"]
    if not is_messages(completions):
        raise RowError("`completions` is not a list of objects", code="data.wrong-type")
    if any(reward_fault(one.get("rank")) for one in completions):
        raise RowError("a `rank` in `completions` is not a number", code="data.bad-rank")
    best_first = sorted(completions, key=lambda one: one["rank"])
    names = [f"`completions` of rank {one['rank']}" for one in best_first]
    row = preference(raw["context"], [one.get("completion") for one in best_first], names)
    others = {key for one in completions for key, value in one.items() if value is not None}
    unread = [f"completions.{key}" for key in sorted(others - {"rank", "completion"})]
    row["unread"] = [*row.get("unread", ()), *unread]
    return {**row, "rewards": [None] * len(row["responses"])}


def _openai_preference(raw: Raw) -> Row:
    fields = raw["input"]
    if not isinstance(fields, Mapping):
        raise RowError("`input` is not an object with `messages`", code="data.wrong-type")
    names = ["preferred_output", "non_preferred_output"]
    prompt = to_messages(fields.get("messages"), "`input.messages`")
    row = preference(prompt, [raw[name] for name in names], [f"`{name}`" for name in names])
    known = ("messages", "tools", "parallel_tool_calls")
    unread = [
        f"input.{key}" for key in sorted(fields) if key not in known and fields[key] is not None
    ]
    return {**row, **tools(fields), "unread": unread, "rewards": [None, None]}


def _strength(prompt: object, raw: Raw, first: str, second: str, column: str) -> Row:
    """Return two responses and their reward gap from a preference from -3 (first is better) to 3."""
    value = raw[column]
    if reward_fault(value) or not -3 <= value <= 3:
        raise RowError(f"`{column}` is not a number from -3 to 3", code="data.rating-out-of-range")
    names = [second, first] if value > 0 else [first, second]
    row = preference(prompt, [raw[name] for name in names], [f"`{name}`" for name in names])
    return {**row, "rewards": [abs(value) / 2, -abs(value) / 2]}


def _helpsteer3(raw: Raw) -> Row:
    return _strength(raw["context"], raw, "response1", "response2", "overall_preference")


def _helpsteer2_preference(raw: Raw) -> Row:
    prompt = marked_messages(raw["prompt"])
    return _strength(prompt, raw, "response_1", "response_2", "preference_strength")


def _helpsteer2_pairs(raw: Raw) -> Row:
    answers = raw["response"]
    for value in raw["helpfulness"]:
        if not reward_fault(value) and not 0 <= value <= 4:
            raise RowError("`helpfulness` is not from 0 to 4", code="data.rating-out-of-range")
    prompt = marked_messages(raw["prompt"])
    row = preference(prompt, answers, ["`response`"] * len(answers))
    return {**row, "rewards": list(raw["helpfulness"])}


def _responses(raw: Raw) -> Row:
    answers = raw["responses"]
    if not isinstance(answers, list):
        raise RowError("`responses` is not a list", code="data.wrong-type")
    row = preference(raw["prompt"], answers, [f"`responses`[{i}]" for i in range(len(answers))])
    ended = _finished(raw, len(answers))
    return {**row, **ended, "unread": [*row.get("unread", ()), *ended.get("unread", ())]}


def _scored_responses(raw: Raw) -> Row:
    row, rewards = _responses(raw), raw["rewards"]
    if not isinstance(rewards, list) or len(rewards) != len(row["responses"]):
        raise RowError(
            "`rewards` is not a list with one reward for each response", code="data.wrong-type"
        )
    return {**row, "rewards": list(rewards)}


def _ranked(raw: Raw) -> Row:
    row = _responses(raw)
    ranks = raw.get("ranks")
    if ranks is not None:
        if not isinstance(ranks, list) or len(ranks) != len(row["responses"]):
            raise RowError(
                "`ranks` is not a list with one rank for each response", code="data.wrong-type"
            )
        if any(reward_fault(rank) for rank in ranks):
            raise RowError("a value of `ranks` is not a number", code="data.bad-rank")
        row = with_responses(row, sorted(range(len(ranks)), key=lambda i: ranks[i]))
    return {**row, "rewards": [None] * len(row["responses"])}


_REWARDS = ("chosen_reward", "rejected_reward")
_ENDED = ("finished",)
_PROMPTS = (*PROMPT_COLUMNS, *WITH_INSTRUCTION, "mask")

# In the order of detection, the most specific columns first.
PREFERENCE_FORMATS: dict[str, Format] = {
    "responses": Format(
        "pair", ("prompt", "responses", "rewards"), _ENDED, _scored_responses, sort=True
    ),
    "ranked": Format(
        "pair", ("prompt", "responses"), ("ranks", *_ENDED), _ranked, may_lack_rewards=True
    ),
    "nemo": Format(
        "pair",
        ("prompt", "chosen_response", "rejected_response"),
        _REWARDS,
        _nemo,
        may_lack_rewards=True,
    ),
    "nemo_rl": Format("pair", ("context", "completions"), (), _nemo_rl, may_lack_rewards=True),
    "openai_preference": Format(
        "pair",
        ("input", "preferred_output", "non_preferred_output"),
        (),
        _openai_preference,
        types={"input": "list"},
    ),
    "helpsteer2_pairs": Format(
        "pair",
        ("prompt", "response", "helpfulness"),
        (),
        _helpsteer2_pairs,
        sort=True,
        together=("response", "helpfulness"),
    ),
    "helpsteer2_preference": Format(
        "pair",
        ("prompt", "response_1", "response_2", "preference_strength"),
        (),
        _helpsteer2_preference,
        ignored=(
            "preference_statement",
            "preference_elaboration",
            "three_most_similar_preferences",
            "all_preferences_unprocessed",
        ),
    ),
    "helpsteer3": Format(
        "pair",
        ("context", "response1", "response2", "overall_preference"),
        (),
        _helpsteer3,
        ignored=("individual_preference", "feedback"),
    ),
    "ultrafeedback_binarized": Format(
        "pair",
        ("chosen", "rejected", "score_chosen", "score_rejected"),
        (*_PROMPTS, *_ENDED),
        _ultrafeedback,
        prompts=PROMPT_COLUMNS,
        ignored=("prompt_id", "messages"),
    ),
    # By name alone without `system`: a question may need its own template.
    "orca": Format(
        "pair",
        ("question", "chosen", "rejected"),
        (*_REWARDS, *_ENDED),
        _orca,
        detected_by=("system", "question", "chosen", "rejected"),
        may_lack_rewards=True,
    ),
    "pairs": Format(
        "pair",
        ("chosen", "rejected"),
        (*_PROMPTS, *_REWARDS, *_ENDED),
        _pairs,
        prompts=PROMPT_COLUMNS,
        may_lack_rewards=True,
    ),
    # Selected only by name, since `pairs` has the same columns.
    "margin": Format(
        "pair",
        ("chosen", "rejected", "margin"),
        (*_PROMPTS, *_ENDED),
        _margin,
        prompts=PROMPT_COLUMNS,
    ),
}
