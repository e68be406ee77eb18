"""Mixtures by weight, and replay of rows of an earlier stage. Pure functions of rows and seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.counts import WEIGHT
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import ReplaySpec


def mix_sources(
    sources: Sequence[tuple[str, Sequence[Row]]],
    weights: Sequence[float | None],
    *,
    seed: int,
    audit: Audit,
) -> list[Row]:
    """Mix several sources into one list.

    Weights are relative fractions of the mixture. Without weights every row is used once. With weights the
    mixture is the largest one with these fractions (up to one row) that repeats no row; rows are selected by
    `seed`, and unused rows are counted. Sources and the rows in them keep their order.

    Args:
        sources: (name, rows) of each source.
        weights: one for each source, all None or all positive.

    Raises:
        DataError: only some sources have a weight, or a weight is not positive.
    """
    if all(weight is None for weight in weights):
        return [row for _, rows in sources for row in rows]
    shares = [_share(name, weight) for (name, _), weight in zip(sources, weights, strict=True)]
    scale = min(len(rows) / share for (_, rows), share in zip(sources, shares, strict=True))
    blend: list[Row] = []
    for index, ((name, rows), share) in enumerate(zip(sources, shares, strict=True)):
        taken = int(scale * share)
        blend += sample(rows, taken, f"{seed}:mix:{index}")
        audit.leave_out(WEIGHT, name, len(rows) - taken)
    return blend


def _share(name: str, weight: float | None) -> Fraction:
    if weight is None:
        raise DataError(
            "this source has no weight, but others have one",
            code="data.missing-weight",
            where=name,
            fix="give a weight to all sources or to none",
        )
    if not 0 < weight < float("inf"):
        raise DataError(
            f"the weight must be a positive number, got {weight}",
            code="data.bad-weight",
            where=name,
            fix="write a number greater than 0, or remove the source",
        )
    return exact(weight)


def add_replay(
    rows: Sequence[Row], earlier: Sequence[Row], spec: ReplaySpec, *, seed: int, audit: Audit
) -> list[Row]:
    """Append a sample (without replacement) of an earlier stage's rows to `rows`.

    The number of replayed rows is rounded to the nearest integer. With `of: mix` they are `fraction` of the
    resulting mixture, n·f / (1 − f) for n rows; with `of: source`, `fraction` of `earlier`.

    Raises:
        DataError: `earlier` has too few rows.
    """
    fraction = exact(spec.fraction)
    wanted = len(rows) * fraction / (1 - fraction) if spec.of == "mix" else len(earlier) * fraction
    count = int(wanted + Fraction(1, 2))
    if count > len(earlier):
        raise DataError(
            f"replay needs {count} rows of stage {spec.stage!r}, which has {len(earlier)}",
            code="data.replay-too-large",
            why=f"`fraction: {spec.fraction:g}` is relative to the mixture, {len(rows)} + {count} rows, and "
            "no row is used twice",
            fix="use a smaller `fraction`, or `of: source`",
        )
    audit.replay = {
        "stage": spec.stage,
        "of": spec.of,
        "fraction": spec.fraction,
        "rows": count,
        "available": len(earlier),
    }
    if count == 0:
        audit.remark(f"replay of stage {spec.stage!r}: the fraction rounds to 0 rows")
    replayed = sample(earlier, count, f"{seed}:replay:{spec.stage}")
    return [*rows, *replayed]


def sample(rows: Sequence[Row], count: int, key: str) -> list[Row]:
    """Select `count` different rows as a pure function of `key`, and keep their order."""
    if count == len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(key).sample(range(len(rows)), count))]


def exact(number: float) -> Fraction:
    """Return the decimal number as written: 0.02 is 1/50, not the nearest binary fraction."""
    return Fraction(repr(number))
