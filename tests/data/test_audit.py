from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import DROPS, WARNINGS


def pair(i: int, prompt: Any, rewards: list[float] | None, chosen: str = "a") -> dict[str, Any]:
    return {"id": f"p{i}", "prompt": prompt, "responses": [chosen, "b"], "rewards": rewards}


def test_counts_keep_three_examples(audit: Audit) -> None:
    for i in range(5):
        audit.drop("too_long", f"r{i}")
    audit.drop("words of its own")
    assert audit.as_dict()["dropped"] == {
        "too_long": {"count": 5, "examples": ["r0", "r1", "r2"]},
        "words of its own": {"count": 1, "examples": []},
    }
    lines = audit.summary_lines()
    assert any("5 rows, longer than max_length (r0, r1, r2)" in line for line in lines)
    assert any(line.endswith("1 row, words of its own") for line in lines)


def test_as_dict_is_json(audit: Audit) -> None:
    audit.add_read("s", 2)
    audit.observe_pairs([pair(0, "x", [2, 1]), pair(1, "x", None)])
    audit.add_lengths(3, [4, 5])
    audit.keep("s")
    assert json.loads(json.dumps(audit.as_dict())) == audit.as_dict()
    assert audit.as_dict()["lengths"]["response"]["max"] == 5


def test_duplicate_prompts_and_overlap(audit: Audit) -> None:
    messages = [{"role": "user", "content": "q"}]
    rows = [pair(0, messages, None), pair(1, list(messages), None), pair(2, "q", None)]
    sft = {"id": "s", "messages": [*messages, {"role": "assistant", "content": "a"}]}
    audit.observe_prompts([*rows, sft])
    assert audit.warnings["duplicate_prompt"].examples == ["p1", "s"]
    assert audit.check_overlap(rows, [sft, pair(9, "new", None)]) == 1
    assert "1 of 2 eval rows" in audit.remarks[0]


def test_pairs_ties_reversed_and_length(audit: Audit) -> None:
    rows = [pair(0, "x", [1, 1], "long " * 9), pair(1, "y", [0, 1]), pair(2, "z", [3, 1])]
    audit.observe_pairs(rows)
    assert (audit.pairs["ties"], audit.pairs["reversed"]) == (1, 1)
    assert any("much longer" in text for text in audit.remarks)


def test_equal_and_saturated_gaps(audit: Audit) -> None:
    rows = [pair(i, str(i), [9.0, 1.0]) for i in range(4)]
    audit.observe_pairs(rows)
    assert "equal" in audit.remarks[0] and audit.remarks[0].endswith("(8)")
    audit.check_target_gaps(rows, 0.5)  # σ(4) = 0.982
    assert len(audit.remarks) == 1
    audit.check_target_gaps(rows, 1.0)  # σ(8) = 0.9997
    assert "4 of 4 rows" in audit.remarks[1]


def test_sources_whose_rewards_have_another_unit(audit: Audit) -> None:
    rows = [{**pair(i, str(i), [2.0, 1.0]), "source": "ones"} for i in range(6)]
    rows += [{**pair(i, str(i), [200.0, 100.0]), "source": "hundreds"} for i in range(3)]
    rows += [{**pair(i, str(i), [0.02, 0.01]), "source": "hundredths"} for i in range(3)]
    rows.append({**pair(0, "0", None), "source": "none"})
    audit.check_target_gaps(rows, 1.0)
    wide, small = audit.remarks
    assert wide.startswith("hundreds: ") and " large " in wide and "3 of 3 rows" in wide
    assert small.startswith("hundredths: ") and " small " in small and "3 of 3 rows" in small
    audit.remarks.clear()
    audit.check_target_gaps(rows, 100.0)  # most rows: one remark
    (remark,) = audit.remarks
    assert (
        ":" not in remark.partition(" is ")[0] and " large " in remark and "9 of 12 rows" in remark
    )


@pytest.mark.parametrize("table", [DROPS, WARNINGS])
def test_reasons_are_used(table: dict[str, str]) -> None:
    """All reasons in the tables are used."""
    from pathlib import Path

    import rpo_trainer.data.audit as module

    files = Path(module.__file__).parent.glob("*.py")
    code = "".join(file.read_text() for file in files if file.name != "audit.py")
    code += Path(module.__file__).read_text().split("class Audit")[1]
    code += (Path(module.__file__).parents[1] / "rewards" / "pairs.py").read_text()
    assert [reason for reason in table if f'"{reason}"' not in code] == []


def test_a_data_set_is_logged_in_two_lines(audit: Audit, caplog: pytest.LogCaptureFixture) -> None:
    audit.max_length = 40
    audit.add_read("a.jsonl", 1500)
    audit.add_read("b.jsonl", 500)
    for i in range(1900):
        audit.keep("a.jsonl" if i < 1400 else "b.jsonl")
        audit.add_lengths(20, [10, 12])
    for i in range(100):
        audit.drop("too_long", f"r{i}")
    audit.warn("duplicate_prompt", "r7")
    audit.warn("blank_responses_removed", "r8")
    audit.add_unread("a.jsonl", ["notes"], ["model"])
    audit.remark("all reward gaps are equal (1)")
    logger = logging.getLogger("test")
    with caplog.at_level(logging.DEBUG, "test"):
        audit.log(logger, "train_dataset", "train data: ")
    shown = [(r.levelno, r.getMessage()) for r in caplog.records if r.levelno >= logging.INFO]
    (info, summary), (warning, warned) = shown
    assert (info, warning) == (logging.INFO, logging.WARNING)
    assert summary.startswith("train data: 2,000 rows") and warned.startswith("train data: 5.0% of")
    for part in ("a.jsonl 1,500", "b.jsonl 500", "1,900", "median 20", "max 12"):
        assert part in summary
    for part in ("100 rows", "max_length 40", "r0, r1, r2", "(r8)", "notes", "gaps are equal"):
        assert part in warned
    details = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert any("(r7)" in line for line in details) and any("model" in line for line in details)


def test_a_data_set_without_warnings_is_one_line(
    audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    audit.add_read("a.jsonl", 3)
    with caplog.at_level(logging.INFO, "test"):
        audit.log(logging.getLogger("test"), "the rows")
        Audit().log(logging.getLogger("test"), "the rows")
    assert caplog.messages == [audit.summary()] and "3 rows" in audit.summary()
