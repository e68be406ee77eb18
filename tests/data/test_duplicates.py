"""Repeated prompts within the training rows, and between training and held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpo_trainer.data import load_rows
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.duplicates import loose_prompt_key, prompt_key
from rpo_trainer.data.filters import drop_duplicates
from rpo_trainer.errors import DataError
from tests.raising import raises


def text_row(i: int, prompt: str) -> dict[str, Any]:
    return {"id": f"r{i}", "source": "s", "prompt": prompt, "response": f"a{i}"}


def chat_row(i: int, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"id": f"r{i}", "source": "s", "messages": messages}


ALIKE = [
    "What is  E\u0301tude no. \ufb01ve?",
    " what is \u00e9tude\n\uff2e\uff2f. five? ",
    "WHAT IS ÉTUDE NO. FIVE?",
]


def test_equal_up_to_case_white_space_and_unicode_form() -> None:
    rows = [text_row(i, prompt) for i, prompt in enumerate(ALIKE)]
    assert len({prompt_key(row) for row in rows}) == 3
    assert len({loose_prompt_key(row) for row in rows}) == 1
    # A text and a message with the same text; the answer of a conversation is not part of its prompt.
    assert loose_prompt_key(chat_row(9, ALIKE[0], "x")) == loose_prompt_key(rows[0])
    assert prompt_key(chat_row(8, "q", "x")) == prompt_key(chat_row(9, "q", "y"))
    other = ["What is etude no. five?", "What is é tude no. five?", ""]
    assert len({loose_prompt_key(text_row(0, text)) for text in [*other, ALIKE[0]]}) == 4


def test_where_turns_end_makes_a_difference() -> None:
    one, other = chat_row(0, "a", "b c", "d", "e"), chat_row(1, "a b", "c", "d", "e")
    assert loose_prompt_key(one) != loose_prompt_key(other)


def test_both_kinds_are_counted_apart(audit: Audit) -> None:
    texts = ["Hi", "hi", "Hi", "HI ", "other"]
    audit.observe_prompts([text_row(i, text) for i, text in enumerate(texts)])
    assert audit.warnings["duplicate_prompt"].examples == ["r2"]
    assert audit.warnings["similar_prompt"].examples == ["r1", "r3"]
    assert (
        "2 rows, prompt repeated up to case, white space or Unicode form (r1, r3)"
        in audit.summary_lines()
    )


def test_the_first_row_of_each_prompt_is_kept(audit: Audit) -> None:
    rows = [text_row(i, text) for i, text in enumerate(["Hi", "hi", "Hi", "b"])]
    assert drop_duplicates(rows, None, audit) == rows
    assert audit.dropped == {}
    assert [r["id"] for r in drop_duplicates(rows, "exact", audit)] == ["r0", "r1", "r3"]
    assert audit.dropped["repeated_prompt"].examples == ["r2"]
    assert [r["id"] for r in drop_duplicates(rows, "normalized", Audit())] == ["r0", "r3"]


def test_across_sources_before_they_are_mixed(
    tmp_path: Path, source: Any, jsonl: Callable[..., str], audit: Audit
) -> None:
    first = jsonl([{"prompt": f"p{i}", "response": "a"} for i in range(4)], "a.jsonl")
    second = jsonl([{"prompt": f"P{i}", "response": "b"} for i in range(2, 8)], "b.jsonl")
    specs = [source(first, weight=1.0), source(second, weight=1.0)]
    options: dict[str, Any] = {"kind": "sft", "base_dir": tmp_path, "seed": 0}
    rows = load_rows(specs, dedup="normalized", audit=audit, **options)
    # P2 and P3 are repeated; each source contributes half of the mixture of the remaining rows.
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2", "p3", "P4", "P5", "P6", "P7"]
    assert audit.dropped["repeated_prompt"].examples == ["b.jsonl:1", "b.jsonl:2"]
    assert audit.warnings == {}
    assert len(load_rows(specs, audit=Audit(), **options)) == 8
    unlike = load_rows(specs, dedup="exact", audit=Audit(), **options)
    assert len(unlike) == 8


def test_overlap_is_a_remark(audit: Audit) -> None:
    train = [text_row(i, text) for i, text in enumerate(["a", "b", "c"])]
    held_out = [text_row(10 + i, text) for i, text in enumerate(["a", "B ", "d"])]
    assert audit.check_overlap(train, held_out) == 2
    assert audit.overlap == audit.as_dict()["overlap"] == {"rows": 3, "exact": 1, "normalized": 1}
    (remark,) = audit.remarks
    assert "2 of 3" in remark and " 1 of them" in remark and "(r10, r11)" in remark
    assert audit.check_overlap(train, [text_row(20, "c")], where="eval") == 1
    assert audit.overlap == {"rows": 4, "exact": 2, "normalized": 1}
    remark = audit.remarks[1]
    assert remark.startswith("eval: 1 of 1 ") and remark.endswith(" (r20)")
    clean = Audit()
    assert clean.check_overlap(train, held_out[2:], on_overlap="error") == 0
    assert clean.remarks == []


def test_overlap_of_what_is_held_out_is_an_error(audit: Audit) -> None:
    train = [text_row(i, text) for i, text in enumerate(["a", "b", "c"])]
    with raises("data.eval-overlap", DataError, where="data.eval", exit_code=3) as error:
        audit.check_overlap(train, [text_row(9, "a"), text_row(10, "x")], on_overlap="error")
    assert "1 of 2" in error.value.what and "(r9)" in error.value.what
    assert "`eval_overlap: warn`" in str(error.value.fix)
