"""The data audit of a stage, read out of chain.json: what was read, dropped and noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpo_trainer.data.audit import DROPS, WARNINGS
from rpo_trainer.report.values import count, mapping


@dataclass(frozen=True)
class Reason:
    """Rows that share a fate: why, in words, how many, the ids of the first few; its short name."""

    text: str
    rows: int
    examples: list[str]
    key: str = ""


@dataclass(frozen=True)
class AuditRecord:
    """Row counts of a stage's training data; the most frequent reasons come first."""

    read: int | None = None
    kept: int | None = None
    dropped: list[Reason] = field(default_factory=list)
    noticed: list[Reason] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def dropped_rows(self) -> int:
        """All dropped rows."""
        return sum(reason.rows for reason in self.dropped)

    def dropped_share(self) -> float | None:
        """Dropped rows as a share of those read, in [0, 1]; None where that is not known."""
        whole = self.read or (self.dropped_rows + self.kept if self.kept else None)
        return min(1.0, self.dropped_rows / whole) if whole else None


def read_audit(record: Mapping[str, Any]) -> AuditRecord:
    """The counts of `Audit.as_dict()`; whatever is missing stays empty."""
    remarks = record.get("remarks")
    return AuditRecord(
        read=_total(record.get("read")),
        kept=_total(record.get("kept")),
        dropped=_reasons(record.get("dropped"), DROPS),
        noticed=_reasons(record.get("warnings"), WARNINGS),
        remarks=[str(remark) for remark in remarks] if isinstance(remarks, list) else [],
    )


def _total(by_source: Any) -> int | None:
    found = [rows for rows in map(count, mapping(by_source).values()) if rows is not None]
    return sum(found) if found else count(by_source)


def _reasons(record: Any, words: Mapping[str, str]) -> list[Reason]:
    """From `{reason: {count, examples}}` or `{reason: count}`; `words` has the texts by reason."""
    found = []
    for key, value in mapping(record).items():
        entry = mapping(value)
        rows = count(entry.get("count")) if entry else count(value)
        examples = entry.get("examples")
        if rows:
            text = words.get(key, key.replace("_", " "))
            ids = [str(example) for example in examples] if isinstance(examples, list) else []
            found.append(Reason(text, rows, ids, key))
    return sorted(found, key=lambda reason: -reason.rows)
