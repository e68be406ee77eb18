"""Audit of files: faults, and properties that a model would learn unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.rewards.row_files import source_of
from rpo_trainer.stages.inspect_data import Findings, audit_file
from tests.raising import raises


def look(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Findings:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return audit_file(source_of(path), **settings)


def pair(i: int, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"id": f"p{i}", "prompt": f"prompt {i}", "chosen": chosen, "rejected": rejected, **more}


def rewarded(i: int, first: float, second: float, **more: Any) -> dict[str, Any]:
    return pair(i, chosen_reward=first, rejected_reward=second, **more)


def test_ties_reversed_rewards_and_their_spread(tmp_path: Path) -> None:
    rows = [rewarded(0, 3.0, 1.0), rewarded(1, 2.0, 2.0), rewarded(2, 0.0, 4.0)]
    found = look(tmp_path / "p.jsonl", rows)
    assert (found.kind, found.faults) == ("pair", [])
    assert (found.audit.pairs["ties"], found.audit.pairs["reversed"]) == (1, 1)
    assert (found.rewards["min"], found.rewards["max"]) == (0.0, 4.0)
    assert sum(count for *_, count in found.rewards["histogram"]) == 6
    assert (found.gaps["min"], found.gaps["max"]) == (-4.0, 2.0)
    shown = found.lines()
    assert "1 ties, 1 reversed among 3 rows" in shown
    assert "gaps: -4 to 2, median 0" in shown
    json.dumps(found.as_dict())


def test_length_bias(tmp_path: Path) -> None:
    rows = [
        rewarded(i, len("x" * (9 + i)), 1.0, chosen="x" * (9 + i), rejected="y") for i in range(4)
    ]
    found = look(tmp_path / "p.jsonl", rows)
    assert found.length["chosen_longer"] == 1.0
    assert found.length["reward_correlation"] == pytest.approx(1.0)
    assert any("prefer length" in line for line in found.lines())
    fair = [pair(0, "long one", "b"), pair(1, "a", "long one"), pair(2, "same", "size")]
    found = look(tmp_path / "q.jsonl", fair)
    assert found.length == {"chosen_longer": 0.5, "reward_correlation": None}


def test_duplicates_overlap_and_texts(tmp_path: Path) -> None:
    rows = [pair(0), pair(0), {**pair(1), "prompt": "PROMPT  0"}, pair(2, "same", "same")]
    rows.append(pair(3, chosen=" "))
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps({"prompt": "prompt 2", "response": "x"}) + "\n")
    found = look(tmp_path / "p.jsonl", rows, against=held_out)
    counts = {reason: count.count for reason, count in found.audit.warnings.items()}
    assert counts["duplicate_prompt"] == 1 and counts["similar_prompt"] == 1
    assert counts["equal_responses"] == 1 and counts["blank_response"] == 1
    assert found.audit.overlap == {"rows": 1, "exact": 1, "normalized": 0}


def test_rows_that_no_stage_would_read_are_named_and_the_rest_looked_over(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [pair(i) for i in range(5)]
    rows[1]["chosen"], rows[3]["prompt"] = 5, None
    found = look(tmp_path / "p.jsonl", rows)
    assert len(found.faults) == 2
    assert any("p1" in fault for fault in found.faults)
    assert found.audit.dropped["unreadable"].count == 2
    assert found.audit.pairs["rows"] == 3
    assert any(line.startswith("fault: ") for line in found.lines())


def test_counts_are_of_all_rows_where_one_cannot_be_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"q{i}", "response": "a", "helpfulness": 3, **({"notes": "x"} if not i else {})}
        for i in range(4)
    ]
    rows[2]["helpfulness"] = 9
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = source_of(path).model_copy(update={"format": "helpsteer2_pairs"})
    audit = audit_file(spec).audit
    assert (audit.rows(), audit.joined) == (4, {"p.jsonl": 4})
    assert audit.unread_columns == {"p.jsonl": ["notes"]}


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    character_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_truncation_and_lengths_need_a_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    rows = [pair(0), pair(1, "x" * 50, "y"), pair(2, chosen="same", rejected="same")]
    found = look(tmp_path / "p.jsonl", rows, tokenizer=tokenizer, max_length=30)
    assert found.audit.dropped["too_long"].count == 1 and "truncated" not in found.audit.warnings
    found = look(
        tmp_path / "p.jsonl", rows, tokenizer=tokenizer, max_length=30, truncation="truncate"
    )
    assert found.audit.warnings["truncated"].count == 1
    assert found.audit.dropped["identical_responses"].count == 1
    assert found.audit.lengths()["response"]["max"] > 4
    found = look(tmp_path / "p.jsonl", rows, tokenizer=tokenizer)
    assert "truncated" not in found.audit.warnings


def test_template_faults(tmp_path: Path, tokenizer: str) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "a"}],
         "chosen": [{"role": "assistant", "content": "b"}],
         "rejected": [{"role": "assistant", "content": "c"}]}
    ]  # fmt: skip
    found = look(tmp_path / "p.jsonl", rows, tokenizer=tokenizer)
    assert len(found.faults) == 1 and "chat template" in found.faults[0]
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no such roles') }}")
    found = look(tmp_path / "p.jsonl", rows, tokenizer=tokenizer, chat_template=str(template))
    assert "no such roles" in found.faults[0]
    found = look(tmp_path / "p.jsonl", rows, tokenizer=tokenizer, chat_template="plain")
    assert found.faults == []


def test_other_kinds_of_rows(tmp_path: Path, tokenizer: str) -> None:
    sft = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": " "}]
    found = look(tmp_path / "s.jsonl", sft)
    assert found.kind == "sft" and found.audit.warnings["blank_response"].count == 1
    assert look(tmp_path / "s.jsonl", sft[:1], tokenizer=tokenizer).faults == []
    rated = [{"prompt": "a", "response": "b", "attributes": {"good": 1.0, "long": None}}]
    found = look(tmp_path / "r.jsonl", rated, tokenizer=tokenizer)
    assert (found.kind, found.faults) == ("rating", [])
    many = [{"prompt": "a", "responses": ["x", "y", "z"], "rewards": [1, 3, 2]}]
    assert look(tmp_path / "k.jsonl", many).gaps["max"] == 2.0


def test_ratings_and_their_length_bias(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "x" * (n + 1), "attributes": {"good": n % 5, "deep": None}}
        for n in range(10)
    ]
    rows[3]["attributes"]["deep"] = 2
    found = look(tmp_path / "r.jsonl", rows)
    good, deep = found.audit.ratings["good"], found.audit.ratings["deep"]
    assert (good["rated"], good["min"], good["max"], good["mean"]) == (10, 0, 4, 2)
    assert [n for *_, n in good["histogram"] if n] == [2] * 5
    assert deep["rated"] == 1
    means = [float(n % 5) for n in range(10)]
    means[3] = 2.5
    expected = np.corrcoef(range(10), means)[0, 1]
    assert found.length == {"rating_correlation": pytest.approx(expected)}
    lines = found.lines()
    assert any("rating" in line and line.endswith(f"{expected:+.2f}") for line in lines)
    assert "good: 10 ratings, from 0 to 4, mean 2.00" in lines
    assert "good: 0 to 4, median 2" in lines and any("\u2588" in line for line in lines)
    assert json.loads(json.dumps(found.as_dict()))["ratings"]["good"]["histogram"]


def test_values_that_are_not_a_data_set(tmp_path: Path) -> None:
    with raises("data.unrecognized-columns", DataError):
        look(tmp_path / "x.jsonl", [{"a": 1}])
    with raises("data.no-such-file", DataError):
        audit_file(source_of(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "name", ["pref_scored_ultrafeedback", "pref_scored_tulu_human", "pref_ranked_oasst_zh"]
)
def test_real_files(name: str, shared_dir: Path) -> None:
    found = audit_file(source_of(shared_dir / "data" / "dev" / f"{name}.jsonl"))
    assert found.kind == "pair" and found.faults == [] and found.lines()


def test_variables_that_the_template_does_not_read_are_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{{ mode }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = str(tmp_path / "tokenizer")
    assert not audit_file(source_of(path, None, {}, None, {"mode": 1}), tokenizer=folder).faults
    with pytest.raises(RecipeError) as error:
        audit_file(source_of(path, None, {}, None, {"nope": 1}), tokenizer=folder)
    assert error.value.where == "--kwargs.nope"
