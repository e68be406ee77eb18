"""Every known format is converted to internal rows; errors name bad rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.formats import FORMATS
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError, Problems
from tests.raising import raises, with_code

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
Q2 = {"role": "user", "content": "q2"}


def good(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def adapted(rows: list[Any], kind: Any, audit: Audit | None = None, **options: Any) -> list[Any]:
    raw = RawSource("src", rows, list(range(1, len(rows) + 1)), "file.jsonl")
    return adapt(raw, kind=kind, audit=audit or Audit(), **options)


def one(row: dict[str, Any], kind: Any, **options: Any) -> dict[str, Any]:
    (found,) = adapted([row], kind, **options)
    assert (found.pop("id"), found.pop("source")) == ("src:1", "src")
    return found


def test_ids() -> None:
    rows = [{"id": i, "text": "x"} for i in ("own", 7, True, None, "")]
    assert [row["id"] for row in adapted(rows, "sft")] == ["own", "7", "src:3", "src:4", "src:5"]


HELPSTEER2 = dict.fromkeys(HELPSTEER_ATTRIBUTES, 3)
SFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [Q, A]}, {"messages": [Q, A]}),
    "prompt_response": (
        {"prompt": "p", "response": " r"},
        {"prompt": "p", "response": " r"},
    ),
    "prompt_response of messages": (
        {"prompt": [Q], "response": "a"},
        {"messages": [Q, A]},
    ),
    "prompt_completion": ({"prompt": "p", "completion": "c"}, {"prompt": "p", "response": "c"}),
    "prompt_completion of messages": (
        {"prompt": [Q], "completion": [A]},
        {"messages": [Q, A]},
    ),
    "text": ({"text": "t"}, {"prompt": "", "response": "t"}),
    "helpsteer2_sft of one turn": (
        {"prompt": "q", "response": "a", **HELPSTEER2},
        {"messages": [Q, A]},
    ),
    "helpsteer2_sft of several turns": (
        {
            "prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nq2",
            "response": "a",
            **{**HELPSTEER2, "verbosity": None},
        },
        {"messages": [Q, A, {"role": "user", "content": "q2"}, A]},
    ),
    "alpaca": (
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": [Q, A]},
    ),
    "alpaca with all": (
        {
            "instruction": "q2",
            "input": "more",
            "output": "a",
            "system": "s",
            "history": [["q", "a"]],
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                Q,
                A,
                {"role": "user", "content": "q2\n\nmore"},
                A,
            ]
        },
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "a"},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                Q,
                good("{}"),
                {"role": "tool", "content": "rain"},
                A,
            ]
        },
    ),
}


@pytest.mark.parametrize("case", SFT)
def test_sft_formats(case: str) -> None:
    raw, wanted = SFT[case]
    assert one(raw, "sft") == wanted
    assert one(raw, "sft", format=case.split()[0]) == wanted


def pair(prompt: Any, *responses: str, rewards: list[float] | None = None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "responses": list(responses),
        "rewards": rewards,
        "ground_truth": None,
        "truth_chosen": False,
    }


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs": ({"prompt": "p", "chosen": "x", "rejected": "y"}, pair("p", "x", "y")),
    "pairs with rewards, chosen first though lower": (
        {"prompt": [Q], "chosen": "x", "rejected": "y", "chosen_reward": 1, "rejected_reward": 2.5},
        pair([Q], "x", "y", rewards=[1.0, 2.5]),
    ),
    "pairs, conversational": (
        {"prompt": [Q], "chosen": [good("x")], "rejected": [good("y")]},
        pair([Q], "x", "y"),
    ),
    "pairs, one message each": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        pair([Q], "x", "y"),
    ),
    "pairs, implicit prompt of messages": (
        {"chosen": [Q, A, Q2, good("x")], "rejected": [Q, A, Q2, good("y")]},
        pair([Q, A, Q2], "x", "y"),
    ),
    "pairs, implicit prompt of text": (
        {"chosen": "User: hi\nAssistant: yes", "rejected": "User: hi\nAssistant: yet"},
        pair("User: hi\nAssistant:", " yes", " yet"),
    ),
    "pairs, implicit prompt with marks": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: yes we can",
            "rejected": "\n\nHuman: hi\n\nAssistant: yes no",
        },
        pair("\n\nHuman: hi\n\nAssistant:", " yes we can", " yes no"),
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": "q",
            "chosen": [Q, good("x")],
            "rejected": [Q, good("y")],
            "score_chosen": 8.5,
            "score_rejected": 3,
            "messages": [Q, A],
        },
        pair([Q], "x", "y", rewards=[8.5, 3.0]),
    ),
    "helpsteer3, first better": (
        {"context": [Q], "response1": "x", "response2": "y", "overall_preference": -3},
        pair([Q], "x", "y", rewards=[1.5, -1.5]),
    ),
    "helpsteer3, second better": (
        {"context": [Q], "response1": "x", "response2": "y", "overall_preference": 1},
        pair([Q], "y", "x", rewards=[0.5, -0.5]),
    ),
    "helpsteer3, equal": (
        {"context": [Q], "response1": "x", "response2": "y", "overall_preference": 0},
        pair([Q], "x", "y", rewards=[0.0, 0.0]),
    ),
    "nemo": (
        {
            "prompt": "p",
            "chosen_response": "x",
            "chosen_reward": 5,
            "rejected_response": "y",
            "rejected_reward": 2,
        },
        pair("p", "x", "y", rewards=[5.0, 2.0]),
    ),
    "nemo, with its marks": (
        {
            "prompt": "<extra_id_0>System\n\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n",
            "chosen_response": "x\n<extra_id_1>",
            "rejected_response": "y\n<extra_id_1>",
            "chosen_reward": 4.0,
            "rejected_reward": 2.0,
        },
        pair([Q], "x", "y", rewards=[4.0, 2.0]),
    ),
    "nemo_rl": (
        {
            "context": [Q],
            "completions": [
                {"rank": 2, "completion": [good("z")]},
                {"rank": 0, "completion": [good("x")]},
                {"rank": 1, "completion": [good("y")]},
            ],
        },
        pair([Q], "x", "y", "z"),
    ),
    "helpsteer2_preference": (
        {
            "prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nq2",
            "response_1": "x",
            "response_2": "y",
            "preference_strength": 2,
            "preference_statement": "better",
            "split": "train",
        },
        pair([Q, A, Q2], "y", "x", rewards=[1.0, -1.0]),
    ),
    "openai_preference": (
        {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [good("b")]},
        pair([Q], "a", "b"),
    ),
    "ranked": ({"prompt": "p", "responses": ["x", "y", "z"]}, pair("p", "x", "y", "z")),
    "ranked, by ranks": (
        {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 0, 1]},
        pair("p", "y", "z", "x"),
    ),
    "responses, best first and ties as given": (
        {"prompt": [Q], "responses": ["a", "b", "c", "d"], "rewards": [1, 3, 1.0, 2]},
        pair([Q], "b", "d", "a", "c", rewards=[3.0, 2.0, 1.0, 1.0]),
    ),
    "responses, two": (
        {"prompt": "p", "responses": ["a", "b"], "rewards": [0, 1]},
        pair("p", "b", "a", rewards=[1.0, 0.0]),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_preference_formats(case: str) -> None:
    raw, wanted = PAIRS[case]
    assert one(raw, "pair") == wanted
    assert one(raw, "pair", format=case.split(",")[0].split()[0]) == wanted


def test_every_format_is_tested() -> None:
    elsewhere = {
        "helpsteer2_pairs",
        "margin",
        "orca",
        *(n for n, f in FORMATS.items() if f.kind == "rating"),
    }
    assert set(FORMATS) == elsewhere | {case.split(",")[0].split()[0] for case in (*SFT, *PAIRS)}


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"prompt": "p", "answer": "x"}, "p"),
        ({"prompt": [Q], "chosen": "x", "rejected": "y"}, [Q]),
        ({"messages": [Q, A, Q2, A]}, [Q, A, Q2]),
        ({"messages": [Q]}, [Q]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q]),
        ({"instruction": "q", "output": "a"}, [Q]),
    ],
)
def test_prompts(raw: dict[str, Any], prompt: Any) -> None:
    found = one({**raw, "ground_truth": 42}, "prompt")
    assert found == {"prompt": prompt, "ground_truth": "42"}


def test_ground_truth_marks_the_chosen() -> None:
    raw = {"prompt": "p", "chosen": "42", "rejected": "43"}
    assert one({**raw, "ground_truth": 42}, "pair")["truth_chosen"]
    assert not one({**raw, "ground_truth": "43"}, "pair")["truth_chosen"]
    assert one({**raw, "truth_chosen": True}, "pair")["truth_chosen"]


HELPSTEER2 = [
    {"prompt": "q", "response": "x", "helpfulness": 3, "correctness": 4, "verbosity": 1},
    {"prompt": "q", "response": "y", "helpfulness": 4, "correctness": 4, "verbosity": 2},
    {"prompt": "q2", "response": "z", "helpfulness": 0, "correctness": 1, "verbosity": 0},
    {"prompt": "q2", "response": "w", "helpfulness": 0, "correctness": 0, "verbosity": 0},
    {"prompt": "alone", "response": "v", "helpfulness": 1, "correctness": 0, "verbosity": 0},
]


def test_helpsteer2_rows_in_a_row_are_a_pair(audit: Audit) -> None:
    first, second = adapted(HELPSTEER2, "pair", audit, require_rewards=True)
    assert first == {**pair([Q], "y", "x", rewards=[4.0, 3.0]), "id": "src:1", "source": "src"}
    assert (second["id"], second["responses"], second["rewards"]) == ("src:3", ["z", "w"], [0, 0])
    assert audit.dropped["fewer_than_two_responses"].examples == ["src:5"]
    audit.add_read("src", 5)
    assert audit.joined == {"src": 3}


def test_helpsteer2_rows_with_faults() -> None:
    out = [{**row, "helpfulness": 5} if i == 3 else row for i, row in enumerate(HELPSTEER2)]
    with raises("data.rating-out-of-range", DataError, rows=["src:3"], of=3) as error:
        adapted(out, "pair")
    assert "`helpfulness`" in error.value.what
    absent = [{**row, "response": None} if i == 1 else row for i, row in enumerate(HELPSTEER2)]
    with raises("data.missing-value", DataError, rows=["src:1"], of=3) as error:
        adapted(absent, "pair")
    assert "`response`" in error.value.what


def test_calls_in_openais_layout() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        Q,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {**A, "weight": 0},
    ]
    found = one({"messages": messages, "parallel_tool_calls": False}, "sft")["messages"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert found[1]["tool_calls"][0]["id"] == "c1"
    assert found[1]["content"] == ""
    assert found[2:] == [messages[2], {**A, "weight": 0}]
    # Text that is not an object is kept: the template writes it.
    call["function"]["arguments"] = "{broken"  # type: ignore[index]
    found = one({"messages": messages}, "sft")["messages"]
    assert found[1]["tool_calls"][0]["function"]["arguments"] == "{broken"
    bare = [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}]
    found = one({"messages": bare}, "sft")["messages"]
    assert found[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


def test_roles_in_capitals() -> None:
    """As NeMo-Aligner writes them."""
    turns = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]
    assert one({"system": "", "mask": "User", "conversations": turns}, "sft") == {
        "messages": [Q, A]
    }


def test_tools_in_every_spelling() -> None:
    wrapped = {"type": "function", "function": {"name": "f"}}
    for tools in ('[{"name": "f"}]', [{"name": "f"}], [wrapped]):
        assert one({"messages": [Q, A], "tools": tools}, "sft")["tools"] == [wrapped]
    for none in ("[]", "", None, []):
        assert "tools" not in one({"messages": [Q, A], "tools": none}, "sft")


def test_null_keys_that_arrow_adds_are_absent_keys() -> None:
    messages = [{**Q, "tool_calls": None}, {**A, "reasoning_content": "hm"}]
    assert one({"messages": messages}, "sft")["messages"] == [Q, messages[1]]


def test_columns_are_renamed() -> None:
    raw = {"frage": "q", "antwort": "a", "prompt": "not this"}
    found = one(raw, "sft", columns={"prompt": "frage", "response": "antwort"})
    assert found == {"prompt": "q", "response": "a"}
    swapped = {"prompt": "p", "chosen": "bad", "rejected": "good"}
    columns = {"chosen": "rejected", "rejected": "chosen"}
    assert one(swapped, "pair", columns=columns)["responses"] == ["good", "bad"]
    for wrong, near in (({"prompt": "fragen"}, "'frage'"), ({"promt": "frage"}, "'prompt'")):
        with raises("data.unknown-column", DataError, where="file.jsonl") as error:
            one(raw, "sft", columns=wrong)
        assert near in error.value.what
        assert any(f"{name!r}," in error.value.what for name in (*wrong, *wrong.values()))
    with raises("data.reversed-columns", DataError, where="file.jsonl") as turned:
        one({"frage": "q", "antwort": "a"}, "sft", columns={"frage": "prompt", "antwort": "text"})
    assert "`{prompt: frage, text: antwort}`" in str(turned.value.fix)


def test_extra_columns_are_listed(audit: Audit) -> None:
    adapted([{"text": "t", "topic": 1, "id": "x"}, {"text": "t", "author": 2}], "sft", audit)
    assert audit.extra_columns == {"src": ["author", "topic"]}


def test_kto_is_refused_politely() -> None:
    for kind in ("sft", "pair"):
        with raises("data.unpaired-labels", DataError):
            one({"prompt": "p", "completion": "c", "label": True}, kind)


def test_labels_of_steps_are_refused_politely() -> None:
    """TRL's stepwise supervision."""
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    for kind in ("sft", "pair"):
        with raises("data.step-labels", DataError) as error:
            one(row, kind)
        assert "`completion`" in str(error.value.fix)


def test_prompts_alone_are_refused() -> None:
    """TRL's prompt-only rows, as its online trainers (RLOO, GRPO) take them."""
    with raises("data.no-responses", DataError) as error:
        one({"prompt": [Q], "ground_truth": "a"}, "pair")
    assert "generate:" in str(error.value.fix)
    assert one({"prompt": [Q]}, "prompt")["prompt"] == [Q]


def test_unknown_columns_and_formats() -> None:
    with raises("data.unrecognized-columns", DataError) as error:
        one({"question": "x"}, "sft")
    assert " question " in error.value.what and "SFT" in error.value.what
    with raises("data.unrecognized-columns", DataError) as error:
        one({"prompt": "p", "chosen": "x", "rejected": "y"}, "sft")
    assert "'pairs'" in str(error.value.why)
    with raises("data.unknown-format", DataError) as error:
        one({"prompt": "p"}, "pair", format="nemmo")
    assert "'nemmo'" in error.value.what and "'nemo'" in error.value.what


def bad_rows(make: Callable[[int], dict[str, Any]], n: int = 10) -> list[dict[str, Any]]:
    """Good rows, of which every second one, starting with the first, is updated by `make`."""
    base = {"prompt": "p", "chosen": "x", "rejected": "y", "chosen_reward": 2, "rejected_reward": 1}
    return [{**base, "id": f"r{i}", **({} if i % 2 else make(i))} for i in range(n)]


REWARDS = {
    "null": None,
    "text": "3",
    "a boolean": True,
    "NaN": math.nan,
    "infinite": -math.inf,
    "list": [1],
}


@pytest.mark.parametrize("fault", REWARDS)
@pytest.mark.parametrize("column", ["chosen_reward", "rejected_reward"])
def test_rewards_that_rpo_cannot_use(fault: str, column: str) -> None:
    rows = bad_rows(lambda i: {column: REWARDS[fault]})
    bad = [f"r{i}" for i in range(0, 10, 2)]
    with raises("data.bad-reward", DataError, where="file.jsonl", rows=bad, of=10) as error:
        adapted(rows, "pair", require_rewards=True)
    assert f" {fault};" in error.value.what
    audit = Audit()
    found = adapted(rows, "pair", audit)  # DPO needs no rewards
    assert [row["rewards"] for row in found[:2]] == [None, [2.0, 1.0]]
    assert audit.warnings["unusable_rewards"].count == 5


def test_rewards_absent_altogether() -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y"}] * 4
    with raises("data.missing-rewards", DataError, where="file.jsonl"):
        adapted(rows, "pair", require_rewards=True)
    audit = Audit()
    assert adapted(rows, "pair", audit)[0]["rewards"] is None
    assert audit.warnings == {}


# A change to good rows, the error code, and a token of the message.
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "chosen": ({"chosen": None}, "data.missing-value", "`chosen`"),
    "prompt": ({"prompt": None}, "data.missing-value", "`prompt`"),
    "number": ({"chosen": 3}, "data.not-messages", "`chosen`"),
    "content": ({"chosen": [{"role": "assistant", "content": 3}]}, "data.wrong-type", "int"),
    "parts": ({"chosen": [{"role": "assistant", "content": [{}]}]}, "data.not-text", "`chosen`"),
    "role": ({"chosen": [{"role": "narrator", "content": "x"}]}, "data.unknown-role", "'narrator'"),
    "no answer": ({"chosen": [Q]}, "data.no-assistant-turn", "`chosen`"),
    "calls": (
        {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "data.tool-call-response",
        "`chosen`",
    ),
    "other prompt": (
        {"chosen": [Q, good("x")], "rejected": [Q2, good("y")]},
        "data.different-prompts",
        "`chosen`",
    ),
    "twice": ({"prompt": [Q, Q2]}, "data.role-order", "`prompt`"),
    "system late": (
        {"prompt": [Q, {"role": "system", "content": "s"}]},
        "data.role-order",
        "'system' as message 2",
    ),
    "tool early": (
        {"prompt": [Q, {"role": "tool", "content": "s"}]},
        "data.role-order",
        "'tool' as message 2",
    ),
    "prefill": ({"prompt": [Q, A]}, "data.role-order", "ends with"),
    "starts": ({"prompt": [A, Q]}, "data.role-order", "starts with"),
    "surrogate": ({"chosen": "\ud83d"}, "data.lone-surrogate", "`chosen`"),
    "flag": ({"truth_chosen": "yes"}, "data.wrong-type", "`truth_chosen`"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_counted_and_named(case: str) -> None:
    update, code, named = FAULTS[case]
    bad = [f"r{i}" for i in range(0, 10, 2)]
    with raises(code, DataError, rows=bad, of=10) as error:
        adapted(bad_rows(lambda i: update), "pair")
    assert named in error.value.what
    assert "5 of 10 rows, first r0, r2, r4" in error.value.what


@pytest.mark.parametrize(
    ("row", "code", "named"),
    [
        ({"messages": [A]}, "data.role-order", "starts with"),
        ({"messages": [Q]}, "data.no-assistant-turn", "`messages`"),
        ({"messages": [Q, A, A]}, "data.role-order", "'assistant' as message 3"),
        ({"messages": []}, "data.not-messages", "`messages`"),
        ({"messages": [Q, A], "tools": "{"}, "data.invalid-json", "`tools`"),
        ({"messages": [Q, A], "tools": [3]}, "data.wrong-type", "`tools`"),
        ({"messages": [Q, {**A, "tool_calls": "f()"}]}, "data.bad-tool-calls", "JSON"),
        ({"messages": [Q, {**A, "weight": 0.5}]}, "data.bad-train-flag", "`weight`"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "data.wrong-type", "`history`"),
        ({"prompt": [Q, A], "response": "a"}, "data.role-order", "ends with"),
        ({"prompt": [Q], "completion": [Q2, A]}, "data.role-order", "'user' as message 2"),
    ],
)
def test_faults_of_sft_rows(row: dict[str, Any], code: str, named: str) -> None:
    with raises(code, DataError) as error:
        one(row, "sft")
    assert named in error.value.what


@pytest.mark.parametrize(
    ("row", "code", "named"),
    [
        (
            {"prompt": "p", "responses": "xy", "rewards": [1, 2]},
            "data.wrong-type",
            "`responses`",
        ),
        (
            {"prompt": "p", "responses": ["x", "y"], "rewards": [1]},
            "data.wrong-type",
            "`rewards`",
        ),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1]}, "data.wrong-type", "`ranks`"),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1, "b"]}, "data.bad-rank", "`ranks`"),
        (
            {"context": [Q], "response1": "x", "response2": "y", "overall_preference": 4},
            "data.rating-out-of-range",
            "-3",
        ),
        ({"chosen": "abc", "rejected": "xyz"}, "data.missing-prompt", "`Assistant:`"),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is bright."},
            "data.missing-prompt",
            "`Assistant:`",
        ),
        (
            {"chosen": "\nAssistant: a", "rejected": "\nAssistant: b"},
            "data.missing-prompt",
            "`Assistant:`",
        ),
        ({"context": [Q], "completions": ["x", "y"]}, "data.wrong-type", "`completions`"),
        ({"context": [Q], "completions": [{"completion": [A]}]}, "data.bad-rank", "`rank`"),
        (
            {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": "2"},
            "data.rating-out-of-range",
            "`preference_strength`",
        ),
    ],
)
def test_faults_of_preference_rows(row: dict[str, Any], code: str, named: str) -> None:
    with raises(code, DataError) as error:
        one(row, "pair")
    assert named in error.value.what


def test_several_kinds_of_faults_come_at_once() -> None:
    rows = bad_rows(lambda i: {"chosen": None} if i < 5 else {"prompt": 3})
    with pytest.raises(Problems) as error:
        adapted(rows, "pair")
    assert with_code(error.value, "data.missing-value").details["rows"] == ["r0", "r2", "r4"]
    assert with_code(error.value, "data.not-messages").details["rows"] == ["r6", "r8"]


def test_a_single_response_is_dropped_and_counted(audit: Audit) -> None:
    rows = [{"prompt": "p", "responses": r} for r in (["x", "y"], ["x"], [])]
    assert len(adapted(rows, "pair", audit)) == 1
    assert audit.dropped["fewer_than_two_responses"].count == 2


def test_a_call_may_follow_the_sentence_that_announces_it() -> None:
    messages = [Q, A, {"role": "function_call", "content": "{}"}]
    assert one({"messages": messages}, "sft")["messages"] == [Q, A, good("{}")]
