"""How a reward model agrees with held-out rows, read out of its stage's `eval` record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpo_trainer.report.scores import Measure, share
from rpo_trainer.report.values import count, mapping, number


@dataclass(frozen=True)
class Agreement:
    """Held-out figures of a reward model; empty for other stages.

    Attributes:
        accuracy: share of pairs whose better response has the higher reward.
        correlations: Pearson's, by attribute; `gap` of pairs, `reward` of the weighted sum.
        calibration: by attribute, (mean prediction, what it was on average) of each bin.
    """

    accuracy: Measure | None = None
    correlations: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def correlation(self) -> float | None:
        """The one that stands for all: of the reward, else of the gap, else of the only attribute."""
        for name in ("reward", "gap", *self.correlations):
            if name in self.correlations:
                return self.correlations[name]
        return None


def read_agreement(record: Mapping[str, Any]) -> Agreement:
    """From what the chain has written; whatever is no number is left out."""
    tables = mapping(record.get("calibration"))
    found = {
        name.removeprefix("pearson/"): value
        for name, raw in record.items()
        if name.startswith("pearson/") and (value := number(raw)) is not None
    }
    pairs = tables.get("pairs")
    total = sum(count(mapping(row).get("count")) or 0 for row in pairs or ())
    return Agreement(
        accuracy=share(record.get("accuracy"), total or None),
        correlations=found,
        calibration={
            str(name): points
            for name, table in tables.items()
            if isinstance(table, list) and (points := _points(table))
        },
    )


def _points(table: list[Any]) -> list[tuple[float, float]]:
    rows = [
        (number(mapping(r).get("predicted")), number(mapping(r).get("observed"))) for r in table
    ]
    return [(x, y) for x, y in rows if x is not None and y is not None]
