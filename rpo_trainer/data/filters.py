"""Filters: preference rows by their rewards, rows of any kind by prompts that occur again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.duplicates import Dedup, loose_prompt_key, prompt_key
from rpo_trainer.data.rows import Row, RowError, RowProblems
from rpo_trainer.errors import DataError
from rpo_trainer.recipe.template_kwargs import COLUMN, kwargs_key

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import FilterSpec

REVERSED_LIMIT = 0.005  # above this share of reversed pairs the columns are more likely swapped


@dataclass(frozen=True)
class _NoFilter:
    """What holds where a recipe has no `filter`: the defaults of FilterSpec."""

    min_chosen_reward: float | None = None
    min_chosen_quantile: float | None = None
    keep_top_fraction: float | None = None
    min_gap: float | None = None
    ties: Literal["keep", "drop"] = "keep"
    reversed: Literal["error", "drop", "keep"] = "error"


def filter_rows(rows: Sequence[Row], spec: FilterSpec | None, audit: Audit) -> list[Row]:
    """The rows that pass; each of the others is counted once, under the first reason that holds.

    The gap of a row is the reward of its first response less that of its last (best and worst
    where there are more than two), not scaled by η. A row passes `min_gap` when it is at least as
    large. The chosen's quality is looked at last, among the rows that pass all else: at least
    `min_chosen_reward`, or the `min_chosen_quantile` of these rows, or one of their
    `keep_top_fraction`, of equal ones the earlier; a chosen response that is the ground truth always
    passes. Rows without rewards pass where no threshold is set. `audit.filter` counts what passes.

    Raises:
        DataError: a threshold is set and rows have no rewards; more than 0.5 % of the rows are
            reversed (`reversed: error`); no row is left.
    """
    used = spec or _NoFilter()
    if used.min_gap is not None or _quality(used) is not None:
        _need_rewards(rows)
    if used.reversed == "error":
        _refuse_reversed(rows)
    kept = []
    for row in rows:
        reason = _reason(row, used)
        if reason is None:
            kept.append(row)
        else:
            audit.drop(reason, row["id"])
    kept = _good_enough(kept, used, audit)
    if spec is not None:
        audit.filter |= {"rows": len(rows), "passed": len(kept)}
    if rows and not kept:
        raise DataError(
            f"the filter leaves none of the {len(rows)} rows",
            code="data.no-rows-left",
            why="; ".join(audit.summary_lines()),
            fix="lower the thresholds of `filter`",
        )
    return kept


def _reason(row: Row, spec: FilterSpec | _NoFilter) -> str | None:
    rewards = row["rewards"]
    if rewards is None:
        return None
    gap = rewards[0] - rewards[-1]
    if gap < 0 and spec.reversed != "keep":
        return "reversed"
    if gap == 0 and spec.ties == "drop":
        return "tie"
    return "small_gap" if spec.min_gap is not None and gap < spec.min_gap else None


def _quality(spec: FilterSpec | _NoFilter) -> float | None:
    """The one threshold of the chosen reward that is set, in whatever units."""
    thresholds = (spec.min_chosen_reward, spec.min_chosen_quantile, spec.keep_top_fraction)
    return next((value for value in thresholds if value is not None), None)


def _good_enough(rows: list[Row], spec: FilterSpec | _NoFilter, audit: Audit) -> list[Row]:
    """The rows whose chosen is good enough, or is the ground truth."""
    if _quality(spec) is None or not rows:
        return rows
    chosen = [row["rewards"][0] for row in rows]
    best_first = sorted(range(len(rows)), key=lambda i: -chosen[i])  # stable
    if spec.keep_top_fraction is not None:
        reason = "chosen_not_in_top"
        count = max(1, round(spec.keep_top_fraction * len(rows)))
        passes = set(best_first[:count])
        threshold = chosen[best_first[count - 1]]
    else:
        reason, threshold = "low_chosen_reward", spec.min_chosen_reward
        if spec.min_chosen_quantile is not None:
            reason = "chosen_below_quantile"
            threshold = sorted(chosen)[int(spec.min_chosen_quantile * len(rows))]
        assert threshold is not None
        passes = {i for i, reward in enumerate(chosen) if reward >= threshold}
    audit.filter["min_chosen_reward"] = threshold
    kept = []
    for i, row in enumerate(rows):
        if i in passes or row.get("truth_chosen"):
            kept.append(row)
        else:
            audit.drop(reason, row["id"])
    return kept


def _need_rewards(rows: Sequence[Row]) -> None:
    problems = RowProblems()
    for row in rows:
        if row["rewards"] is None:
            fault = RowError(
                "the filter needs rewards, and there are none", code="data.missing-rewards"
            )
            problems.add(fault, row["id"])
    problems.raise_if_any(len(rows), fix="remove `filter`, or give rewards")


def _refuse_reversed(rows: Sequence[Row]) -> None:
    ids = [row["id"] for row in rows if row["rewards"] and row["rewards"][0] < row["rewards"][-1]]
    if len(ids) > REVERSED_LIMIT * len(rows):
        raise DataError(
            f"chosen has a lower reward than rejected: {len(ids)} of {len(rows)} rows, "
            f"first {', '.join(ids[:3])}",
            code="data.reversed-pairs",
            why=f"above {REVERSED_LIMIT:.1%} it is more likely that the columns are swapped",
            fix="swap the columns with `columns:`, or set `filter: {reversed: drop}` (or keep)",
        )


def drop_duplicates(rows: Sequence[Row], how: Dedup | None, audit: Audit) -> list[Row]:
    """The first row of each prompt, with the same variables of the chat template; the others are counted."""
    if how is None:
        return list(rows)
    key = prompt_key if how == "exact" else loose_prompt_key
    seen: set[tuple[bytes, str]] = set()
    kept = []
    for row in rows:
        found = key(row), kwargs_key(row.get(COLUMN))
        if found in seen:
            audit.drop("repeated_prompt", row["id"])
        else:
            seen.add(found)
            kept.append(row)
    return kept
