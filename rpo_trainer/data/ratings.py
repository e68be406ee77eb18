"""Ratings of responses as the targets of a reward model, and rows set aside to test it on."""

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
    """The rating rows, `attributes` a list of numbers or None in the order of the names.

    A row that rates none of them is dropped and counted; so are ratings of other attributes.

    Args:
        attributes: names, the heads of the model.
        rating_range: lowest and highest rating that can be right; None: any finite number.

    Raises:
        DataError, or Problems: ratings out of range; an attribute that no row rates.
    """
    problems = RowProblems()
    targets = []
    for row in rows:
        values = [row["attributes"].get(name) for name in attributes]
        for name, value in zip(attributes, values, strict=True):
            if value is not None and rating_range and not _within(value, rating_range):
                low, high = rating_range
                fault = RowError(
                    f"the rating `{name}` is not from {low:g} to {high:g}",
                    code="data.rating-out-of-range",
                )
                problems.add(fault, row["id"])
        if all(value is None for value in values):
            audit.drop("no_ratings", row["id"])
        else:
            targets.append({**row, "attributes": values})
    problems.raise_if_any(
        len(rows),
        why="out of its range it is more likely another column than a rating",
        fix="fix these rows, or change `rating_range`",
    )
    known = {name for row in rows for name, value in row["attributes"].items() if value is not None}
    if missing := [name for name in attributes if name not in known]:
        raise DataError(
            f"no row rates {', '.join(missing)}",
            code="data.unrated-attribute",
            why=f"the ratings are of {', '.join(sorted(known)) or 'nothing'}",
            fix="name the attributes as the data does",
        )
    if unused := sorted(known - set(attributes)):
        audit.remark(f"ratings not used: {', '.join(unused)}")
    audit.observe_ratings(attributes, [row["attributes"] for row in targets])
    return targets


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def hold_out(rows: Sequence[Row], fraction: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to test on, without a prompt in both.

    `fraction` of the prompts (rounded to the nearest, at least one), drawn by `seed`, go with all
    their rows into the second list. Both keep the order of `rows`.

    Raises:
        DataError: fewer than two different prompts.
    """
    prompts = list(dict.fromkeys(map(prompt_key, rows)))
    if len(prompts) < 2:
        raise DataError(
            f"{len(rows)} rows with {len(prompts)} different prompt: none can be held out",
            code="data.too-few-prompts",
            where="data.eval_fraction",
            why="a prompt is never on both sides: what was trained on says nothing of new prompts",
            fix="give more rows, or held-out rows of their own (data.eval)",
        )
    count = min(max(1, round(len(prompts) * exact(fraction))), len(prompts) - 1)
    held = set(random.Random(f"{seed}:holdout").sample(prompts, count))
    train = [row for row in rows if prompt_key(row) not in held]
    return train, [row for row in rows if prompt_key(row) in held]
