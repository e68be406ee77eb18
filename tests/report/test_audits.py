from __future__ import annotations

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import DROPS
from rpo_trainer.report.audits import read_audit
from rpo_trainer.stages.record import AuditRecord, ReasonRecord


def test_an_audit_is_read_back_in_words() -> None:
    audit = Audit()
    audit.add_read("a.jsonl", 9)
    audit.add_read("b.jsonl", 1)
    for row in range(3):
        audit.drop("tie", f"a.jsonl:{row}")
    audit.drop("too_long", "b.jsonl:1")
    audit.warn("duplicate_prompt", "a.jsonl:8")
    audit.remark("a remark (1)")
    found = read_audit(AuditRecord.from_json(audit.as_dict()))
    assert (found.rows, found.dropped_rows, found.dropped_fraction()) == (10, 4, 0.4)
    assert [(reason.text, reason.rows) for reason in found.dropped] == [
        (DROPS["tie"], 3),
        (DROPS["too_long"], 1),
    ]
    assert found.dropped[0].examples == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2"]
    assert [reason.rows for reason in found.noticed] == [1]
    assert found.remarks == ["a remark (1)"]


def test_unknown_reasons_are_kept() -> None:
    dropped = {"made_up_reason": ReasonRecord(7), "none": ReasonRecord(0)}
    found = read_audit(AuditRecord(dropped=dropped, kept={"a": 3}))
    assert [(reason.text, reason.rows) for reason in found.dropped] == [("made up reason", 7)]
    assert found.dropped_fraction() == 0.7


def test_an_empty_audit_has_no_fraction() -> None:
    assert read_audit(AuditRecord()).dropped_fraction() is None
    assert read_audit(AuditRecord()).dropped == []
