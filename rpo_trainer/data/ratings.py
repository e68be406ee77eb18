"""Ratings of responses as targets of a reward model, and held-out rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.duplicates import prompt_key
from rpo_trainer.data.mix import exact
from rpo_trainer.data.rows import Row, RowError, RowProblems
from rpo_trainer.errors import DataError


def rating_targets(
    rows: Sequence[Row],
    attributes: Sequence[str],
    *,
    rating_range: tuple[float, float] | None = None,
    audit: Audit,
) -> list[Row]:
    """Convert `attributes` of rating rows to a list of numbers or None, in the order of the names.

    Rows without a rating of any of them are dropped and counted. Ratings of other attributes are reported.

    Args:
        attributes: names of the model's heads.
        rating_range: lowest and highest valid rating; None allows any finite number.

    Raises:
        DataError, or Problems: ratings out of range, or an attribute without ratings.
    """
    problems = RowProblems()
    targets = []
    for row in rows:
        values = [row["attributes"].get(name) for name in attributes]
        for name, value in zip(attributes, values, strict=True):
            if value is not None and rating_range and not _within(value, rating_range):
                low, high = rating_range
                fault = RowError(
                    f"the rating `{name}` is outside the range {low:g} to {high:g}",
                    code="data.rating-out-of-range",
                )
                problems.add(fault, row["id"])
        if all(value is None for value in values):
            audit.drop("no_ratings", row["id"])
        else:
            targets.append({**row, "attributes": values})
    problems.raise_if_any(
        len(rows),
        fix="fix these rows, or change `rating_range`",
    )
    known = {name for row in rows for name, value in row["attributes"].items() if value is not None}
    if missing := [name for name in attributes if name not in known]:
        raise DataError(
            f"none of the rows has a rating of {', '.join(missing)}",
            code="data.unrated-attribute",
            why=f"the rated attributes are: {', '.join(sorted(known)) or 'none'}",
            fix="use the attribute names of the data",
        )
    if unused := sorted(known - set(attributes)):
        audit.remark(f"ratings not used: {', '.join(unused)}")
    audit.observe_ratings(attributes, [row["attributes"] for row in targets])
    return targets


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def hold_out(rows: Sequence[Row], fraction: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows and held-out rows that share no prompt.

    `fraction` of the prompts (rounded to the nearest, at least one), selected by `seed`, are held out with
    all their rows. Both lists keep the order of `rows`.

    Raises:
        DataError: fewer than two different prompts.
    """
    prompts = list(dict.fromkeys(map(prompt_key, rows)))
    if len(prompts) < 2:
        raise DataError(
            f"cannot hold out rows: {len(rows)} rows with {len(prompts)} different prompt(s)",
            code="data.too-few-prompts",
            where="data.eval_fraction",
            why="training and held-out rows must not share a prompt",
            fix="add rows with other prompts, or use separate held-out data (`data.eval`)",
        )
    count = min(max(1, round(len(prompts) * exact(fraction))), len(prompts) - 1)
    held = set(random.Random(f"{seed}:holdout").sample(prompts, count))
    train = [row for row in rows if prompt_key(row) not in held]
    return train, [row for row in rows if prompt_key(row) in held]
