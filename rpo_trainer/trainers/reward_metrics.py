"""Agreement of a reward model with held-out ratings or pairs: accuracy, correlation, calibration.

Undefined metrics (a correlation with a constant, accuracy without pairs) are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Table = list[dict[str, float]]

_BINS = 10
_PER_BIN = 5  # minimum number of values per bin, or else fewer bins


def pair_metrics(gaps: Array, targets: Array | None) -> tuple[dict[str, float], dict[str, Table]]:
    """Return the metrics of pairs.

    Args:
        gaps: `[N]`, predicted reward gaps.
        targets: `[N]`, reward gaps of the rows, or None.

    Returns:
        `accuracy` (fraction of positive gaps), `pearson/gap` and `spearman/gap` (correlation of the two
        gaps), `calibration/pairs`; and the table of the last: confidence σ(|gap|) and fraction of positive
        gaps.
    """
    right = (gaps > 0).astype(float)
    metrics = {"accuracy": float(right.mean())}
    if targets is not None:
        metrics |= _correlations("gap", gaps, targets)
    table = calibration_table(1 / (1 + np.exp(-np.abs(gaps))), right)
    return {**metrics, "calibration/pairs": calibration_error(table)}, {"pairs": table}


def rating_metrics(
    scores: Array, ratings: Array, names: Sequence[str], weights: Array, prompts: Sequence[Any]
) -> tuple[dict[str, float], dict[str, Table]]:
    """Return the metrics of rated responses, for each attribute and, if there are several, for the reward.

    Args:
        scores: `[N, A]`, predictions.
        ratings: `[N, A]`, NaN for missing ratings.
        weights: `[A]`, weights of the attributes in the reward.
        prompts: `[N]`, equal for the same prompt.

    Returns:
        `pearson/`, `spearman/`, `rmse/`, `bias/` (mean prediction − mean rating) and `calibration/`, each
        followed by the name of the attribute; `accuracy`: fraction of correctly ordered pairs, among
        responses to the same prompt with different rewards. And the tables of the calibration: mean
        prediction and mean rating.
    """
    columns = [(n, scores[:, i], ratings[:, i]) for i, n in enumerate(names)]
    used = weights != 0
    predicted = scores[:, used] @ weights[used]
    rated = ratings[:, used] @ weights[used]  # NaN if any of them is
    if len(names) > 1:
        columns.append(("reward", predicted, rated))
    metrics: dict[str, float] = {}
    tables: dict[str, Table] = {}
    for name, found, wanted in columns:
        known = ~np.isnan(wanted)
        if not known.any():
            continue
        found, wanted = found[known], wanted[known]
        tables[name] = calibration_table(found, wanted)
        metrics |= _correlations(name, found, wanted)
        metrics[f"rmse/{name}"] = float(np.sqrt(np.mean((found - wanted) ** 2)))
        metrics[f"bias/{name}"] = float(found.mean() - wanted.mean())
        metrics[f"calibration/{name}"] = calibration_error(tables[name])
    accuracy = _order_accuracy(predicted, rated, prompts)
    return metrics if accuracy is None else {"accuracy": accuracy, **metrics}, tables


def pearson(x: Array, y: Array) -> float | None:
    """Return the linear correlation, in [−1, 1]; None if either is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Array, y: Array) -> float | None:
    """Rank correlation; ties have their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def calibration_table(predicted: Array, observed: Array) -> Table:
    """Return the bins of equal count, sorted by prediction: mean `predicted`, mean `observed`, `count`."""
    order = np.argsort(predicted, kind="stable")
    bins = max(1, min(_BINS, len(order) // _PER_BIN))
    return [
        {
            "predicted": float(predicted[part].mean()),
            "observed": float(observed[part].mean()),
            "count": len(part),
        }
        for part in np.array_split(order, bins)
    ]


def calibration_error(table: Table) -> float:
    """Return the mean absolute difference of the two means of a bin, weighted by its count."""
    total = sum(row["count"] for row in table)
    return sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in table) / total


def _correlations(name: str, x: Array, y: Array) -> dict[str, float]:
    found = {f"pearson/{name}": pearson(x, y), f"spearman/{name}": spearman(x, y)}
    return {key: value for key, value in found.items() if value is not None}


def _ranks(x: Array) -> Array:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = (last - (counts - 1) / 2)[group]
    return mean


def _order_accuracy(predicted: Array, rated: Array, prompts: Sequence[Any]) -> float | None:
    by_prompt: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if not np.isnan(rated[i]):
            by_prompt.setdefault(prompt, []).append(i)
    right = [
        bool((predicted[i] - predicted[j]) * (rated[i] - rated[j]) > 0)
        for rows in by_prompt.values()
        for place, i in enumerate(rows)
        for j in rows[:place]
        if rated[i] != rated[j]
    ]
    return sum(right) / len(right) if right else None
