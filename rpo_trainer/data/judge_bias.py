"""Position and length bias of a judge, computed from the rows it has judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rpo_trainer.data.rows import Row

# Verdicts: the answer shown first is better, the second, or neither.
FIRST, SECOND, EQUAL = "A", "B", "C"


def biases(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute position and length bias of a judge from its judged rows.

    Returns:
        `comparisons`, `consistent`, `equal`: counts; `first_position`: the fraction of single verdicts with a
        winner that prefer the answer shown first (½ without bias); `longer_wins`: the fraction of consistent
        winners that are the longer answer. Fractions of nothing are None.
    """
    compared = [(row, c) for row in rows for c in row.get("judge") or ()]
    named = [v for _, c in compared for v in c["verdicts"] if v != EQUAL]
    won = [(row, c) for row, c in compared if c["better"] in (0, 1)]
    longer = []
    for row, c in won:
        lengths = [len(row["responses"][i]) for i in c["responses"]]
        if lengths[0] != lengths[1]:
            longer.append((lengths[0] > lengths[1]) == (c["better"] == 1))
    return {
        "comparisons": len(compared),
        "consistent": sum(c["better"] is not None for _, c in compared),
        "equal": sum(c["better"] == 0.5 for _, c in compared),
        "first_position": _share(v == FIRST for v in named),
        "longer_wins": _share(longer),
    }


def _share(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def bias_lines(found: dict[str, Any]) -> list[str]:
    """Return the result of `biases` as lines of text."""
    lines = [
        "judge: {consistent} of {comparisons} comparisons consistent, {equal} equal".format(**found)
    ]
    if found["first_position"] is not None:
        lines.append(
            f"judge: {found['first_position']:.0%} of its verdicts are for the answer shown first "
            "(50% without position bias)"
        )
    if found["longer_wins"] is not None:
        lines.append(f"judge: the longer answer wins {found['longer_wins']:.0%} of the time")
    return lines
