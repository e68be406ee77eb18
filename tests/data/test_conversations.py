"""Conversations in the forms of data exports and other trainers."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError
from tests.raising import raises

Row = dict[str, Any]
S = {"role": "system", "content": "s"}
Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
Q2 = {"role": "user", "content": "q2"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}


def adapted(rows: list[Row], kind: Any, audit: Audit | None = None, **options: Any) -> list[Row]:
    raw = RawSource("src", rows, list(range(len(rows))), "file")
    return adapt(raw, kind=kind, audit=audit or Audit(), **options)


def one(row: Row, kind: Any, audit: Audit | None = None, **options: Any) -> Row:
    (found,) = adapted([row], kind, audit, **options)
    return found


def sharegpt(messages: list[Row]) -> list[Row]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


# ---------------------------------------------------------------- prompts of conversations


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([Q, A, Q2], 3),
        ([Q, A, Q2, B], 3),
        ([S, Q], 2),
        ([Q, A], 1),
        ([Q, CALLS, RESULT], 3),
        ([Q, CALLS, RESULT, A], 3),
        ([Q, A, CALLS], 1),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_prompt_has_all_turns_before_the_last_answer(
    column: str, messages: list[Row], prompt: int
) -> None:
    if column == "conversations":
        if CALLS in messages and messages[-1] == CALLS:
            pytest.skip("calls are turns of their own there")
        messages = [m | {"content": m["content"] or "f()"} for m in messages]
        messages = [{k: m[k] for k in ("role", "content")} for m in messages]
    given = sharegpt(messages) if column == "conversations" else messages
    assert one({column: given}, "prompt")["prompt"] == messages[:prompt]


def test_a_prompt_in_alpacas_columns_keeps_its_history() -> None:
    row = {"instruction": "q2", "input": "", "history": [["q", "a"]]}
    assert one(row, "prompt")["prompt"] == [Q, A, Q2]


# ---------------------------------------------------------------- JSON text of messages

BOTH = {"chosen": [Q, A], "rejected": [Q, B]}
TEXTS: dict[str, tuple[str, Row, tuple[str, ...]]] = {
    "messages": ("sft", {"messages": [Q, A]}, ("messages",)),
    "sharegpt": ("sft", {"conversations": sharegpt([Q, A])}, ("conversations",)),
    "prompt_response": ("sft", {"prompt": [Q], "response": "a"}, ("prompt",)),
    "prompt_completion": ("sft", {"prompt": [Q], "completion": [A]}, ("prompt", "completion")),
    "alpaca": ("sft", {"instruction": "q", "output": "a", "history": [["q", "a"]]}, ("history",)),
    "pairs": ("pair", BOTH, ("chosen", "rejected")),
    "pairs with a prompt": ("pair", {"prompt": [Q], "chosen": [A], "rejected": [B]},
                            ("prompt", "chosen", "rejected")),
    "pairs, one of them text": ("pair", BOTH, ("chosen",)),
    "pairs, one turn": ("pair", {"prompt": [Q], "chosen": A, "rejected": B}, ("chosen", "rejected")),
    "pairs of axolotl": ("pair", {"messages": [Q], "chosen": A, "rejected": B}, ("messages",)),
    "pairs of llamafactory": ("pair", {"conversations": sharegpt([Q]), "chosen": A, "rejected": B},
                              ("conversations", "chosen")),
    "nemo": ("pair", {"prompt": [Q], "chosen_response": [A], "rejected_response": [B]},
             ("prompt", "chosen_response", "rejected_response")),
    "nemo_rl": ("pair", {"context": [Q], "completions": [{"rank": 0, "completion": [A]},
                                                        {"rank": 1, "completion": [B]}]},
                ("context", "completions")),
    "helpsteer3": ("pair", {"context": [Q], "response1": "a", "response2": "b",
                            "overall_preference": 1}, ("context",)),
    "responses": ("pair", {"prompt": [Q], "responses": ["a", "b"], "rewards": [1, 0]},
                  ("prompt", "responses", "rewards")),
    "openai_preference": ("pair", {"input": {"messages": [Q]}, "preferred_output": [A],
                                   "non_preferred_output": [B]},
                          ("input", "preferred_output", "non_preferred_output")),
    "attributes": ("rating", {"prompt": [Q], "response": "a", "attributes": {"x": 1}},
                   ("prompt", "attributes")),
    "prompts": ("prompt", {"prompt": [Q]}, ("prompt",)),
    "prompts of messages": ("prompt", {"messages": [Q, A]}, ("messages",)),
    "prompts of sharegpt": ("prompt", {"conversations": sharegpt([Q, A])}, ("conversations",)),
}  # fmt: skip


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("case", TEXTS)
def test_messages_as_text_are_messages(case: str, write: Any) -> None:
    kind, row, columns = TEXTS[case]
    text = {**row, **{column: write(row[column]) for column in columns}}
    assert adapted([text, text], kind) == adapted([row, row], kind)


def test_messages_as_text_inside_lists() -> None:
    row = {"prompt": [Q], "responses": [[A], [B]], "rewards": [1, 0]}
    text = {**row, "responses": [json.dumps([A]), json.dumps([B])]}
    assert one(text, "pair") == one(row, "pair")
    row = {
        "context": [Q],
        "completions": [{"rank": i, "completion": [m]} for i, m in enumerate((A, B))],
    }
    inner = [{**c, "completion": json.dumps(c["completion"])} for c in row["completions"]]
    assert one({**row, "completions": inner}, "pair") == one(row, "pair")


@pytest.mark.parametrize("column", ["chosen", "prompt"])
def test_a_few_such_texts_among_others_are_text_and_counted(column: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    text = json.dumps([Q, A])
    audit = Audit()
    rows = adapted([row, {**row, column: text}, row], "pair", audit)
    assert (rows[1]["prompt"] if column == "prompt" else rows[1]["responses"][0]) == text
    assert audit.warnings["messages_as_text"].examples == ["src:1"]
    assert any(level == logging.WARNING and "src:1" in line for level, line in audit.messages())


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"role": "user", "content": "x"}',
        "[link](x)",
        '[{"role": "user", "id": 1}]',
        "[{'",
    ],
)
def test_other_json_is_text(text: str) -> None:
    audit = Audit()
    row = {"prompt": text, "response": text}
    found = one(row, "sft", audit)
    assert (found["prompt"], found["response"]) == (text, text)
    assert one({"instruction": "q", "input": text, "output": "a"}, "sft")["messages"][0][
        "content"
    ] == (f"q\n\n{text}")
    assert not audit.warnings


@pytest.mark.parametrize(
    ("kind", "code", "rows"),
    [
        ("pair", "data.mixed-column", [{"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}] * 3
         + [{"chosen": json.dumps([Q, A])[:-4], "rejected": json.dumps([Q, B])}]),
        ("sft", "data.messages-for-text", [{"text": json.dumps([Q, A])}] * 4),
        ("sft", "data.messages-for-text", [{"instruction": "q", "output": json.dumps([A])}] * 4),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_decoded_are_named(kind: str, code: str, rows: list[Row]) -> None:
    with raises(code) as error:
        adapted(rows, kind)
    assert "src:" in str(error.value) and "messages" in str(error.value)


# ---------------------------------------------------------------- spellings of OpenAI


def test_a_function_call_is_a_tool_call() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"x": 1}'},
    }
    given = [Q, call, {"role": "function", "content": "r"}, A]
    assert one({"messages": given}, "sft")["messages"] == [Q, CALLS, RESULT, A]


@pytest.mark.parametrize(
    ("turn", "code", "named"),
    [
        ({"content": None, "refusal": "no"}, "data.missing-content", "`refusal`"),
        ({"content": None}, "data.missing-content", "no `content`"),
        ({"content": "", "function_call": "f"}, "data.bad-tool-calls", "`function_call`"),
        (
            {"content": "", "function_call": {"name": "f"}, "tool_calls": [CALL]},
            "data.conflicting-calls",
            "`function_call`",
        ),
        ({"content": "", "tool_calls": "f()"}, "data.bad-tool-calls", "`tool_calls`"),
    ],
)
def test_turns_without_text_are_named_without_a_mapping(turn: Row, code: str, named: str) -> None:
    row = {"messages": [Q, {"role": "assistant", **turn}], "notes": "x"}
    with raises(code, DataError) as error:
        one(row, "sft")
    assert named in error.value.what
    assert "columns:" not in str(error.value.fix)


def test_a_mapping_is_offered_for_the_column_that_is_missing() -> None:
    pair = {"chosen": "a", "rejected": "b"}
    with raises("data.missing-value", DataError) as error:
        adapted([{"prompt": "q", **pair}, {"instruction": "q", **pair}], "pair")
    assert "columns: {prompt: instruction}" in str(error.value.fix)


def test_openais_preferences() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"input": {"messages": [S, Q], "tools": tools, "parallel_tool_calls": True, "model": "m"},
           "preferred_output": [A], "non_preferred_output": [B]}  # fmt: skip
    audit = Audit()
    found = one(row, "pair", audit)
    assert (found["prompt"], found["responses"], found["tools"]) == ([S, Q], ["a", "b"], tools)
    assert [reason for reason in audit.warnings if "input.model" in reason]


@pytest.mark.parametrize("tools", ['{"name": "f"}', {"name": "f"}, ['{"name": "f"}'], '["{}"]'])
def test_tools_in_every_spelling(tools: Any) -> None:
    (found,) = one({"messages": [Q, A], "tools": tools}, "sft")["tools"]
    assert found["type"] == "function" and found["function"] in ({"name": "f"}, {})


def test_a_turn_with_calls_may_follow_a_sentence() -> None:
    messages = [Q, A, CALLS, RESULT, B]
    assert one({"messages": messages}, "sft")["messages"] == messages
    text = {**CALLS, "tool_calls": json.dumps([CALL])}
    assert one({"messages": [Q, A, text, RESULT, B]}, "sft")["messages"] == messages


# ---------------------------------------------------------------- prompts that are repeated


@pytest.mark.parametrize("given", [[Q], [S, Q]])
@pytest.mark.parametrize("lead", [[], [Q], [S, Q]])
def test_responses_may_repeat_their_prompt_with_or_without_its_system_turn(
    given: list[Row], lead: list[Row]
) -> None:
    row = {"prompt": given, "chosen": [*lead, A], "rejected": [*lead, B]}
    found = one(row, "pair")
    assert found["prompt"] == ([S, Q] if S in given + lead else [Q])
    assert found["responses"] == ["a", "b"]


def test_system_turns_that_differ() -> None:
    lead = [{**S, "content": "t"}, Q]
    with raises("data.conflicting-system", DataError):
        one({"prompt": [S, Q], "chosen": [*lead, A], "rejected": [*lead, B]}, "pair")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("You are", "You\n\nYou are"), ("Your", "You\n\nYour"), ("You\n\nHi", "You\n\nHi"),
     ("You\nHi", "You\nHi"), ("You", "You")],
)  # fmt: skip
def test_a_system_prompt_is_repeated_where_a_line_ends_with_it(prompt: str, found: str) -> None:
    row = {"system": "You", "prompt": prompt, "response": "a"}
    assert one(row, "sft")["prompt"] == found


# ---------------------------------------------------------------- columns next to conversations


@pytest.mark.parametrize("column", ["prompt", "question", "Instruction"])
def test_a_prompt_that_the_messages_hold_is_not_missed(column: str) -> None:
    """Rows of UltraChat and no_robots."""
    rows: list[Row] = [{column: "q", "prompt_id": "x", "messages": [Q, A]} for _ in range(2)]
    audit = Audit()
    adapted(rows, "sft", audit)
    assert not audit.unread_columns and column in audit.extra_columns["src"]
    rows[1][column] = "another"
    audit = Audit()
    adapted(rows, "sft", audit)
    assert audit.unread_columns == {"src": [column]}


@pytest.mark.parametrize("column", ["enable_thinking", "margin", "loss_mask", "sample_weight"])
@pytest.mark.parametrize("value", [0.5, {"enable_thinking": False}])
def test_columns_that_change_training_are_warnings(column: str, value: Any) -> None:
    for kind, row in (
        ("pair", {"prompt": [Q], "chosen": [A], "rejected": [B]}),
        ("sft", {"messages": [Q, A]}),
    ):
        audit = Audit()
        one({**row, column: value}, kind, audit)
        assert audit.unread_columns == {"src": [column]}


@pytest.mark.parametrize("tag", [True, False])
def test_llamafactorys_kto_rows_are_refused(tag: bool) -> None:
    row = {"instruction": "q", "input": "", "output": "a", "kto_tag": tag}
    for other in (row, {"messages": [Q, A], "kto_tag": tag}):
        with raises("data.unpaired-labels", DataError) as error:
            one(other, "sft")
        assert "kto_tag" in error.value.what
    audit = Audit()
    one(row, "sft", audit, format="alpaca")
    assert audit.unread_columns == {"src": ["kto_tag"]}
