"""Mixtures by weight, and replay of an earlier stage's rows. Pure functions of rows and seed."""

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
    """One list from several sources.

    Weights are relative shares of the blend. Without any, every row is used once. With them the
    blend is the biggest that has these shares (to one row) and repeats nothing; what it leaves out
    is sampled by `seed` and counted. Sources, and the rows in them, keep their order.

    Args:
        sources: (name, rows) each.
        weights: one a source, all None or all positive.

    Raises:
        DataError: some sources have a weight and some have not, or a weight is not positive.
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
            "some sources have a weight and this one has none",
            code="data.missing-weight",
            where=name,
            why="a share means nothing unless all sources have one",
            fix="give every source of the mixture a weight, or none",
        )
    if not 0 < weight < float("inf"):
        raise DataError(
            f"a weight must be a positive number, not {weight}",
            code="data.bad-weight",
            where=name,
            why="it is the source's part of all rows",
            fix="write a number above 0, or leave the source out",
        )
    return exact(weight)


def add_replay(
    rows: Sequence[Row], earlier: Sequence[Row], spec: ReplaySpec, *, seed: int, audit: Audit
) -> list[Row]:
    """`rows`, and after them a sample (without replacement) of an earlier stage's rows.

    The number of replayed rows, rounded to the nearest: `of: mix` makes them `fraction` of the
    resulting blend, n·f / (1 − f) for n rows; `of: source` takes `fraction` of `earlier`.

    Raises:
        DataError: `earlier` has fewer rows than that.
    """
    fraction = exact(spec.fraction)
    wanted = len(rows) * fraction / (1 - fraction) if spec.of == "mix" else len(earlier) * fraction
    count = int(wanted + Fraction(1, 2))
    if count > len(earlier):
        raise DataError(
            f"replay needs {count} rows of stage {spec.stage!r}, which has {len(earlier)}",
            code="data.replay-too-large",
            why=f"{spec.fraction:g} of the blend of {len(rows)} + {count} rows, none used twice",
            fix="a smaller `fraction`, or `of: source`",
        )
    audit.replay = {
        "stage": spec.stage,
        "of": spec.of,
        "fraction": spec.fraction,
        "rows": count,
        "available": len(earlier),
    }
    if count == 0:
        audit.remark(f"replay of stage {spec.stage!r}: the fraction rounds to no row at all")
    replayed = sample(earlier, count, f"{seed}:replay:{spec.stage}")
    return [*rows, *replayed]


def sample(rows: Sequence[Row], count: int, key: str) -> list[Row]:
    """`count` different rows in their old order, a pure function of `key`."""
    if count == len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(key).sample(range(len(rows)), count))]


def exact(number: float) -> Fraction:
    """The decimal that was written: 0.02 is one fiftieth, not the nearest binary fraction."""
    return Fraction(repr(number))
