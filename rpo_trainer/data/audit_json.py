"""`Audit` as JSON and back, with the same counts and messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import Count, Differences, SpecialText, TruncatedResponses

_PLAIN = (
    "read", "kept", "joined", "left_out", "remarks", "extra_columns", "unread_columns", "max_length",
    "pairs", "filter", "calibration", "judge", "replay", "ratings", "overlap",
)  # fmt: skip


def write_audit(path: Path, audit: Audit) -> None:
    """Write an audit to a JSON file."""
    path.write_text(json.dumps(audit_to_json(audit)), encoding="utf-8")


def read_audit(path: Path) -> Audit:
    """Return the audit of `write_audit`."""
    return audit_from_json(json.loads(path.read_text(encoding="utf-8")))


def audit_to_json(audit: Audit) -> dict[str, Any]:
    """Return all counts as JSON-compatible values; of the lengths, only the quantiles."""
    return {
        **{name: getattr(audit, name) for name in _PLAIN},
        "dropped": {reason: count.as_dict() for reason, count in audit.dropped.items()},
        "warnings": {reason: count.as_dict() for reason, count in audit.warnings.items()},
        "special_text": {
            source: [found.of, found.rows, sorted(found.tokens)]
            for source, found in audit.special_text.items()
        },
        "generation": {
            source: [found.of, found.rows.as_dict(), found.example]
            for source, found in audit.generation.items()
        },
        "cut": {source: found.as_dict() for source, found in audit.cut.items()},
        "lengths": audit.lengths(),
    }


def audit_from_json(content: Mapping[str, Any]) -> Audit:
    """Return the audit of `audit_to_json`; further lengths cannot be added to it."""
    audit = Audit()
    for name in _PLAIN:
        setattr(audit, name, content[name])
    for name in ("dropped", "warnings"):
        counts = {reason: _count(found) for reason, found in content[name].items()}
        setattr(audit, name, counts)
    audit.special_text = {
        source: SpecialText(of, rows, set(tokens))
        for source, (of, rows, tokens) in content["special_text"].items()
    }
    for source, (of, rows, example) in content["generation"].items():
        found = audit.generation[source] = Differences()
        found.of, found.rows = of, _count(rows)
        found.example = None if example is None else (example[0], example[1])
    audit.cut = {source: TruncatedResponses(**found) for source, found in content["cut"].items()}
    audit.known_lengths = content["lengths"]
    return audit


def _count(content: Mapping[str, Any]) -> Count:
    count = Count()
    count.count, count.examples = content["count"], list(content["examples"])
    count.of = content.get("of")
    return count
