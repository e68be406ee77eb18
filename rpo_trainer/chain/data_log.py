"""Logs the audit of each stage's data; one line for a stage with the data of an earlier one."""

from __future__ import annotations

import logging
import re

from rpo_trainer.data import Audit
from rpo_trainer.recipe import Stage

logger = logging.getLogger(__name__)


class DataLog:
    """Logs the data audits of the stages of one run."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[str, set[str]]] = {}  # by data: first stage and its findings

    def log(self, stage: Stage, audit: Audit, held_out: Audit | None, label: str) -> None:
        """Log the audit of a stage.

        The rounds of a repeated stage sample new responses, so their counts differ slightly: they get one
        line, unless there is a finding that the first round did not have.

        Args:
            label: prefix of each line.
        """
        findings = _findings(audit)
        if held_out is not None:
            findings |= {f"held out: {one}" for one in _findings(held_out)}
        before, known = self._logged.setdefault(_data_of(stage), (stage.name, findings))
        if before != stage.name and findings <= known:
            level = logging.WARNING if audit.dropped else logging.INFO
            logger.log(level, "%s same data as %s%s", label, before, _counts(audit))
            return
        audit.log(logger, f"the rows of stage {stage.name}", f"{label} data: ")
        if held_out is not None:
            held_out.log(logger, "the held-out rows", f"{label} held-out data: ")


def _data_of(stage: Stage) -> str:
    """Return what the data of a stage depends on, as text."""
    return f"{stage.kind} {stage.max_length} {stage.truncation} {stage.data.model_dump_json()}"


def _findings(audit: Audit) -> set[str]:
    """Return the warnings of an audit, without numbers and ids of rows."""
    found = {f"dropped: {reason}" for reason in audit.dropped} | set(audit.warnings)
    found |= {f"{reason}: {source}" for reason, by in audit.left_out.items() for source in by}
    found |= {f"differs: {source}" for source, one in audit.generation.items() if one.text()}
    found |= {f"truncated: {source}" for source, one in audit.cut.items() if one.many}
    found |= {f"unread: {source}" for source in audit.unread_columns}
    return found | {re.sub(r"\(.*?\)|[\d.,]+", "", text) for text in audit.remarks}


def _counts(audit: Audit) -> str:
    read, kept = sum(audit.read.values()), sum(audit.kept.values())
    dropped = sum(count.count for count in audit.dropped.values())
    return f": {read} rows read, {kept} kept" + (f", {dropped} dropped" if dropped else "")
