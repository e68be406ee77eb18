"""The prompt of a pair is read from its column, or an error asks for a mapping; it is never guessed."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rpo_trainer.data import Audit
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.columns import mapping_for, unread
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError
from rpo_trainer.report.audits import read_audit
from rpo_trainer.stages.record import AuditRecord
from tests.raising import raises

Row = dict[str, Any]
Q = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = {"chosen": "Sure, yes", "rejected": "Sure, no"}


def adapted(row: Row, kind: Any = "pair", audit: Audit | None = None, **options: Any) -> Row:
    raw = RawSource("src", [row], [1], "file.jsonl")
    (found,) = adapt(raw, kind=kind, audit=audit or Audit(), **options)
    return found


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"instruction": "q", "input": "", **PAIR}, [Q]),
        ({"instruction": "q", "input": "i", "system": "s", "history": [["q", "a"]], **PAIR},
         [SYSTEM, Q, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q\n\ni"}]),
        ({"messages": [Q], **PAIR}, [Q]),
        ({"messages": [Q], "chosen": {"role": "assistant", "content": "Sure, yes"},
          "rejected": {"role": "assistant", "content": "Sure, no"}}, [Q]),
        ({"messages": [SYSTEM, Q], "system": "s", **PAIR}, [SYSTEM, Q]),
        ({"trajectory": [{"from": "user", "value": "q"}], **PAIR}, [Q]),
        ({"conversations": [{"from": "human", "value": "q"}], "system": "s", **PAIR}, [SYSTEM, Q]),
        ({"prompt": "q", "system": "s", **PAIR}, "s\n\nq"),
    ],
)  # fmt: skip
def test_layouts_of_pairs(columns: Row, prompt: Any) -> None:
    audit = Audit()
    found = adapted(columns, audit=audit)
    assert found["prompt"] == prompt
    assert found["responses"] == ["Sure, yes", "Sure, no"]
    assert not audit.extra_columns and not audit.warnings


def test_orca_pairs() -> None:
    row = {"system": "s", "question": "q", **PAIR}
    for options in ({}, {"format": "orca"}):
        audit = Audit()
        assert adapted(row, audit=audit, **options)["prompt"] == [SYSTEM, Q]
        assert not audit.extra_columns and not audit.warnings
        assert adapted({**row, "system": ""}, **options)["prompt"] == [Q]
    rewards = {"chosen_reward": 2, "rejected_reward": 1}
    assert adapted({**row, **rewards}, require_rewards=True)["rewards"] == [2.0, 1.0]


def test_a_question_with_another_prompt_column_is_not_an_orca_pair() -> None:
    audit = Audit()
    row = {"system": "s", "question": "other", "prompt": "q", **PAIR}
    assert adapted(row, audit=audit)["prompt"] == "s\n\nq"
    assert audit.unread_columns == {"src": ["question"]}


@pytest.mark.parametrize(
    "column", ["question", "query", "input", "context", "conversation", "history", "problem"]
)
@pytest.mark.parametrize("start", ["", "\n\nHuman: hi\n\nAssistant:"])
def test_a_prompt_is_not_guessed_next_to_a_column_that_may_hold_it(column: str, start: str) -> None:
    row = {column: "What?", "chosen": f"{start} Sure, yes", "rejected": f"{start} Sure, no"}
    with raises("data.missing-prompt", DataError) as error:
        adapted(row)
    assert column in error.value.what
    assert f"columns: {{prompt: {column}}}" in str(error.value.fix)
    assert adapted(row, columns={"prompt": column})["prompt"] == "What?"


def test_rows_that_lack_a_prompt_name_the_columns_that_stand_unread() -> None:
    answer = [{"role": "assistant", "content": "a"}]
    row = {"question": "What?", "chosen": answer, "rejected": answer}
    with raises("data.missing-prompt", DataError) as error:
        adapted(row)
    assert "`prompt`" in error.value.what
    assert "columns: {prompt: question}" in str(error.value.fix)


@pytest.mark.parametrize(
    ("kind", "columns", "mapping"),
    [
        ("pair", ("history", "human_ref_A", "human_ref_B", "labels"),
         "{prompt: history, chosen: human_ref_A, rejected: human_ref_B}"),
        ("sft", ("question", "answer"), "{prompt: question, response: answer}"),
        ("sft", ("problem", "solution", "answer"), "{prompt: problem, response: answer}"),
        ("prompt", ("question",), "{prompt: question}"),
        ("pair", ("prompt", "better", "worse"), "{chosen: better, rejected: worse}"),
        ("sft", ("question", "that"), "{prompt: question, response: NAME}"),
    ],
)  # fmt: skip
def test_columns_of_no_format(kind: Any, columns: tuple[str, ...], mapping: str) -> None:
    with raises("data.unrecognized-columns", DataError) as error:
        adapted(dict.fromkeys(columns, "x"), kind)
    assert all(column in error.value.what for column in columns)
    assert f"columns: {mapping}" in str(error.value.fix)


def test_a_prompt_that_no_conversation_holds_is_counted() -> None:
    def talk(text: str) -> list[Row]:
        return [Q, {"role": "assistant", "content": text}]

    for column in ("prompt", "instruction"):
        for text, counted in (("q", 0), ("another", 1)):
            audit = Audit()
            row = {column: text, "chosen": talk("a"), "rejected": talk("b")}
            assert adapted(row, audit=audit)["prompt"] == [Q]
            assert sum(f"`{column}`" in reason for reason in audit.warnings) == counted


def test_which_columns_are_missed() -> None:
    rows = [
        {"score": 3, "model": "m", "chosen-model": "n", "notes": "text", "empty": None,
         "blank": [" "], "meta": {"a": "b"}, "weight": 0.5, "nested": [{"a": ["b"]}]},
    ]  # fmt: skip
    missed, others = unread(rows, rows[0].keys(), ())
    assert missed == ["nested", "notes", "weight"]
    assert others == ["chosen-model", "meta", "model", "score"]
    assert unread(rows, ["notes"], ("notes",)) == ([], ["notes"])


def test_relevant_unread_columns_are_warnings_and_others_info() -> None:
    audit = Audit()
    adapted({"prompt": "q", **PAIR, "notes": "x", "model": "m"}, audit=audit)
    levels = {text: level for level, text in audit.messages()}
    assert levels["src: columns not read: notes"] == logging.WARNING
    assert levels["src: unused columns: model"] == logging.INFO


def test_names_are_guessed_once() -> None:
    assert mapping_for(["prompt", "context"], ["question"]) == (
        "`columns: {prompt: question, context: NAME}`"
    )


def test_the_report_has_the_same_text_about_unread_columns() -> None:
    """`check` shows a finding of the report once, and not also as a message of the audit."""
    audit = Audit()
    adapted({"prompt": "q", "notes": "x", **PAIR}, audit=audit)
    found = read_audit(AuditRecord.from_json(audit.as_dict())).concerns("the rows")
    texts = {concern.text for concern in found if concern.key == "unread-columns"}
    assert texts and texts <= {text for _, text in audit.messages()}
