"""η, the scale between rewards and log-odds: what a given one does to the gaps, and one that fits.

RPO's target for a pair is the probability σ(η · gap). An η too large makes every target 1, and RPO
learns no more than DPO; one too small makes every target ½, and it learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rpo_trainer.data.audit import FLAT, SATURATED
from rpo_trainer.data.counts import quantiles
from rpo_trainer.data.rows import Row
from rpo_trainer.errors import DataError

QUANTILE, TARGET = 0.5, 0.9  # without labels: half of the (unequal) pairs get at least this target
BINS = 12
_STEPS = 200


@dataclass(frozen=True)
class Fit:
    """A fitted η.

    Attributes:
        method: `labels`: maximum likelihood of the labels under σ(η · gap), where some labels go
            against the rewards; `quantile`: σ(η · gap) is 0.9 for the median gap that is not 0.
        pairs: how many gaps it is fitted to.
        against: labels that go against the rewards.
    """

    reward_scale: float
    method: Literal["labels", "quantile"]
    pairs: int
    against: int

    def line(self) -> str:
        """For people."""
        how = (
            f"by the likelihood of {self.pairs} labels, {self.against} of them against the rewards"
            if self.method == "labels"
            else f"so that σ(η · gap) is {TARGET:g} for the median of {self.pairs} gaps"
        )
        return f"reward_scale (η): {self.reward_scale:g}, fitted {how}"


def label_gaps(rows: Sequence[Row]) -> list[float]:
    """Reward of the first response less that of the last, for rows with rewards."""
    return [row["rewards"][0] - row["rewards"][-1] for row in rows if _has_rewards(row)]


def _has_rewards(row: Row) -> bool:
    rewards = row.get("rewards") or [None]
    return None not in rewards


def fit_reward_scale(gaps: Sequence[float], *, labelled: bool = True) -> Fit:
    """η for these gaps, rounded to four digits.

    Args:
        gaps: rewards of chosen less rejected, where a label says which is which; negative where
            label and rewards disagree. Without any such, labels tell nothing of η.
        labelled: False: the order of the responses is no label.

    Raises:
        DataError: no gaps, all of them 0, or labels that go against the rewards more than with them.
    """
    found = np.asarray(gaps, dtype=np.float64)
    unequal = found[found != 0]
    if not len(unequal):
        what = "there are no reward gaps" if not len(found) else "all reward gaps are 0"
        raise DataError(
            f"{what}: η cannot be fitted",
            code="rewards.no-gaps",
            why="η scales the gaps between the rewards of a prompt's responses, and 0 stays 0",
            fix="give reward_scale a number",
            details={"gaps": len(found)},
        )
    against = int((found < 0).sum())
    if labelled and against:
        return Fit(_rounded(_likeliest(found)), "labels", len(found), against)
    middle = float(np.quantile(np.abs(unequal), QUANTILE))
    return Fit(_rounded(_logit(TARGET) / middle), "quantile", len(unequal), 0)


def _likeliest(gaps: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The η > 0 that maximises Σ log σ(η · gap), a concave function, by bisection of its slope."""
    unit = float(np.abs(gaps).max())
    scaled = gaps / unit

    def slope(eta: float) -> float:
        return float((scaled / (1 + np.exp(np.clip(eta * scaled, -700, 700)))).sum())

    if slope(0.0) <= 0:
        raise DataError(
            "the labels go against the rewards more than with them: no η above 0 fits",
            code="rewards.contradict-labels",
            why="more often than not a column is swapped, or a lower reward is the better one",
            fix="look at the rewards, and at what the columns are called",
        )
    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2 / unit


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# ---------------------------------------------------------------- what a given η does


@dataclass(frozen=True)
class Calibration:
    """The gaps of some rows, and what η makes of them.

    Attributes:
        without: further rows, which have no rewards (a judge may leave them undecided).
        gap: min, median, mean, p95, max.
        histogram: (lower edge, upper edge, count) of each bin.
        reward_scale: the η looked at.
        saturated, flat: shares of the rows whose target is above 0.999 (or below 0.001), or within
            0.05 of ½.
        fit: an η that fits, None where none does; `unfit` then says why.
    """

    rows: int
    without: int
    ties: int
    against: int
    gap: dict[str, float]
    histogram: list[tuple[float, float, int]]
    reward_scale: float
    saturated: float
    flat: float
    fit: Fit | None
    unfit: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def warning(self) -> str | None:
        """What is wrong with η, if most targets are saturated or flat."""
        if self.saturated > 0.5:
            return (
                f"{self.saturated:.0%} of the targets are saturated: RPO has become DPO; "
                "a smaller reward_scale keeps the gaps"
            )
        if self.flat > 0.5:
            return (
                f"{self.flat:.0%} of the targets are within 0.05 of 1/2: RPO learns next to "
                "nothing; a larger reward_scale shows the gaps"
            )
        return None


def calibrate(rows: Sequence[Row], reward_scale: float | None = None) -> Calibration:
    """What η does to the gaps of preference rows with rewards.

    Args:
        reward_scale: None: the fitted one, or 1 where none fits.

    Raises:
        DataError: no row has rewards.
    """
    gaps = label_gaps(rows)
    if not gaps:
        raise DataError(
            "no row has rewards",
            code="data.missing-rewards",
            why="η is judged by what it makes of the gaps between rewards",
            fix="score the rows first (rpo-trainer score)",
        )
    fit, unfit = None, None
    try:
        fit = fit_reward_scale(gaps)
    except DataError as error:
        unfit = error.what
    eta = reward_scale if reward_scale is not None else (fit.reward_scale if fit else 1.0)
    sizes = np.abs(np.asarray(gaps)) * eta
    counts, edges = np.histogram(gaps, bins=BINS)
    return Calibration(
        rows=len(gaps),
        without=len(rows) - len(gaps),
        ties=sum(gap == 0 for gap in gaps),
        against=sum(gap < 0 for gap in gaps),
        gap=quantiles(sorted(gaps)),
        histogram=[
            (float(a), float(b), int(n))
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
        reward_scale=eta,
        saturated=float((sizes > _logit(SATURATED)).mean()),
        flat=float((sizes < _logit(FLAT)).mean()),
        fit=fit,
        unfit=unfit,
    )


def by_source(rows: Sequence[Row], reward_scale: float | None = None) -> dict[str, Calibration]:
    """The same for each source, and as `all` for all together, at one η."""
    whole = calibrate(rows, reward_scale)
    sources: dict[str, list[Row]] = {}
    for row in rows:
        if _has_rewards(row):
            sources.setdefault(str(row["source"]), []).append(row)
    found = {"all": whole}
    if len(sources) > 1:
        found |= {name: calibrate(own, whole.reward_scale) for name, own in sources.items()}
    return found
