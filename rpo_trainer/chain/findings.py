"""The findings of a check: all errors, raised together, and lines to print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rpo_trainer.data import Audit
from rpo_trainer.errors import Problems, RPOTrainerError
from rpo_trainer.report.audits import read_audit
from rpo_trainer.stages.error_places import each, locate, name_part
from rpo_trainer.stages.record import AuditRecord

if TYPE_CHECKING:
    from rpo_trainer.recipe.where import Origins

WARNING = "WARNING: "  # begins each warning line, after its indentation


class Findings:
    """Errors and lines of one check.

    Attributes:
        problems: the errors, without duplicates: the rounds of a repeated stage find the same ones, and
            replay finds those of the replayed stage.
        lines: lines to print, in order.
    """

    def __init__(self) -> None:
        self.problems: list[RPOTrainerError] = []
        self.lines: list[str] = []
        self._texts: set[str] = set()

    @contextmanager
    def collected(self, part: str | None = None) -> Iterator[None]:
        """Collect errors raised inside; errors of data get their place in the recipe (`part`)."""
        try:
            yield
        except RPOTrainerError as error:
            for one in each(error):
                if (text := str(one)) in self._texts:
                    continue
                self._texts.add(text)
                if part is not None:
                    name_part(one, part)
                self.problems.append(one)

    def add(self, text: str) -> None:
        """Add a line about the current stage."""
        self.lines.append(f"  {text}")

    def warn(self, text: str) -> None:
        """Add a warning line."""
        self.add(f"{WARNING}{text}")

    def add_audit(self, audit: Audit, what: str, *, sampled: bool = False, label: str = "") -> None:
        """Add the lines of an audit, and a warning for each of its concerns."""
        found = read_audit(AuditRecord.from_json(audit.as_dict())).concerns(what, sampled=sampled)
        concerns = [concern for concern in found if not concern.minor]
        warned = {concern.text for concern in concerns}
        for _, text in audit.messages(what):
            if text not in warned:
                self.add(f"{label}{text}")
        for concern in concerns:
            advice = f" {concern.advice}" if concern.advice else ""
            self.warn(f"{label}{concern.text}.{advice}")

    def raise_problems(self, origins: Origins) -> None:
        """Raise Problems if errors were found, each with its line in the recipe and in line order."""
        if not self.problems:
            return
        for problem in self.problems:
            locate(problem, origins)
        distinct = {str(problem): problem for problem in self.problems}
        raise Problems(sorted(distinct.values(), key=_line))


def _line(problem: RPOTrainerError) -> float:
    found = re.match(r".*?:(\d+) \(", problem.where or "")
    return int(found[1]) if found else math.inf
