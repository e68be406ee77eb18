"""Filter preference rows by their rewards, and rows of any kind by repeated prompts."""

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

REVERSED_LIMIT = 0.005  # above this fraction of reversed pairs the columns are probably swapped


@dataclass(frozen=True)
class _NoFilter:
    """The defaults of FilterSpec, for a recipe without `filter`."""

    min_chosen_reward: float | None = None
    min_chosen_quantile: float | None = None
    keep_top_fraction: float | None = None
    min_gap: float | None = None
    ties: Literal["keep", "drop"] = "keep"
    reversed: Literal["error", "drop", "keep"] = "error"


def filter_rows(rows: Sequence[Row], spec: FilterSpec | None, audit: Audit) -> list[Row]:
    """Return the rows that pass; each of the others is counted once, under the first reason that applies.

    The reward gap of a row is the reward of its first response minus that of its last (best and worst), not
    scaled by η. A row passes `min_gap` if its gap is at least as large. The chosen reward is checked last,
    among the rows that pass everything else: it must be at least `min_chosen_reward`, at least the
    `min_chosen_quantile` of these rows, or in their `keep_top_fraction` (the earlier row wins a tie). A
    chosen response that is the ground truth always passes. Rows without rewards pass if no threshold is
    set. `audit.filter` counts the rows that pass.

    Raises:
        DataError: a threshold is set and rows have no rewards; more than 0.5% of the rows are reversed
            (`reversed: error`); or no rows are left.
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
            f"`filter` drops all {len(rows)} rows",
            code="data.no-rows-left",
            why="; ".join(audit.summary_lines()),
            fix="relax the thresholds of `filter`",
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
    """Return the threshold of the chosen reward that is set; None if there is none."""
    thresholds = (spec.min_chosen_reward, spec.min_chosen_quantile, spec.keep_top_fraction)
    return next((value for value in thresholds if value is not None), None)


def _good_enough(rows: list[Row], spec: FilterSpec | _NoFilter, audit: Audit) -> list[Row]:
    """Return the rows whose chosen response reaches the threshold or is the ground truth."""
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
                "`filter` needs rewards, and the row has none", code="data.missing-rewards"
            )
            problems.add(fault, row["id"])
    problems.raise_if_any(len(rows), fix="add rewards, or remove `filter`")


def _refuse_reversed(rows: Sequence[Row]) -> None:
    ids = [row["id"] for row in rows if row["rewards"] and row["rewards"][0] < row["rewards"][-1]]
    if len(ids) > REVERSED_LIMIT * len(rows):
        raise DataError(
            f"chosen has a lower reward than rejected: {len(ids)} of {len(rows)} rows, "
            f"first {', '.join(ids[:3])}",
            code="data.reversed-pairs",
            why=f"with more than {REVERSED_LIMIT:.1%} such rows the columns are probably swapped",
            fix="swap the columns with `columns:`, or set `filter: {reversed: drop}` (or `keep`)",
        )


def drop_duplicates(rows: Sequence[Row], how: Dedup | None, audit: Audit) -> list[Row]:
    """Keep the first row of each prompt with the same template variables, and count the others."""
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
