"""η, the scale of the rewards: how a given η maps reward gaps to targets, and how to fit one.

RPO's target for a pair is the probability σ(η · reward gap). If η is too large, every target is 1 and RPO
becomes DPO; if it is too small, every target is ½ and there is nothing to learn.
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

QUANTILE, TARGET = 0.5, 0.9  # without labels: the median nonzero gap gets this target
BINS = 12
_STEPS = 200


@dataclass(frozen=True)
class Fit:
    """A fitted η.

    Attributes:
        reward_scale: η.
        method: `labels`: maximum likelihood of the labels under σ(η · gap), where some labels contradict
            the rewards; `quantile`: σ(η · gap) is 0.9 for the median nonzero gap.
        pairs: number of gaps used.
        against: number of labels that contradict the rewards.
    """

    reward_scale: float
    method: Literal["labels", "quantile"]
    pairs: int
    against: int

    def line(self) -> str:
        """Return a sentence for the log."""
        how = (
            f"by the likelihood of {self.pairs} labels, {self.against} of which contradict the rewards"
            if self.method == "labels"
            else f"so that σ(η · gap) is {TARGET:g} at the median of {self.pairs} gaps"
        )
        return f"reward_scale (η): {self.reward_scale:g}, fitted {how}"


def label_gaps(rows: Sequence[Row]) -> list[float]:
    """Return the reward of the first response minus that of the last, for rows with rewards."""
    return [row["rewards"][0] - row["rewards"][-1] for row in rows if _has_rewards(row)]


def _has_rewards(row: Row) -> bool:
    rewards = row.get("rewards") or [None]
    return None not in rewards


def fit_reward_scale(gaps: Sequence[float], *, labeled: bool = True) -> Fit:
    """Fit η to these gaps, rounded to four digits.

    Args:
        gaps: reward(chosen) − reward(rejected); negative where the preference label contradicts the
            rewards. If none is negative, the labels carry no information about η.
        labeled: whether the order of the responses is a preference label.

    Raises:
        DataError: there are no gaps, all are 0, or most labels contradict the rewards.
    """
    found = np.asarray(gaps, dtype=np.float64)
    unequal = found[found != 0]
    if not len(unequal):
        what = "there are no reward gaps" if not len(found) else "all reward gaps are 0"
        raise DataError(
            f"{what}: η cannot be fitted",
            code="rewards.no-gaps",
            fix="set reward_scale to a number",
            details={"gaps": len(found)},
        )
    against = int((found < 0).sum())
    if labeled and against:
        return Fit(_rounded(_likeliest(found)), "labels", len(found), against)
    middle = float(np.quantile(np.abs(unequal), QUANTILE))
    return Fit(_rounded(_logit(TARGET) / middle), "quantile", len(unequal), 0)


def _likeliest(gaps: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the η > 0 that maximizes Σ log σ(η · gap), a concave function, by bisection on its slope."""
    unit = float(np.abs(gaps).max())
    scaled = gaps / unit

    def slope(eta: float) -> float:
        return float((scaled / (1 + np.exp(np.clip(eta * scaled, -700, 700)))).sum())

    if slope(0.0) <= 0:
        raise DataError(
            "most labels contradict the rewards: no η above 0 fits",
            code="rewards.contradict-labels",
            why="usually two columns are swapped, or lower rewards are better",
            fix="check the rewards and the names of their columns",
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


# ---------------------------------------------------------------- the effect of a given η


@dataclass(frozen=True)
class Calibration:
    """The reward gaps of some rows, and their targets for a value of η.

    Attributes:
        rows: number of rows with rewards.
        without: number of rows without (those that a judge left undecided, for example).
        ties: rows whose gap is 0.
        against: rows whose chosen response has the lower reward.
        gap: min, median, mean, p95, max.
        histogram: (lower edge, upper edge, count) of each bin.
        reward_scale: the η that was used.
        saturated, flat: fraction of rows whose target is above 0.999 (or below 0.001), and within 0.05
            of ½.
        fit: the fitted η; None if none fits, with the reason in `unfit`.
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
        """Return plain values for JSON."""
        return asdict(self)

    def warning(self) -> str | None:
        """Return a warning if most targets are saturated or flat, else None."""
        if self.saturated > 0.5:
            return (
                f"{self.saturated:.0%} of the targets are saturated, so that RPO becomes DPO: "
                "use a smaller reward_scale"
            )
        if self.flat > 0.5:
            return (
                f"{self.flat:.0%} of the targets are within 0.05 of 1/2, so that they carry little "
                "signal: use a larger reward_scale"
            )
        return None


def calibrate(rows: Sequence[Row], reward_scale: float | None = None) -> Calibration:
    """Compute the targets of the gaps of preference rows for a value of η.

    Args:
        rows: preference rows, the chosen response first.
        reward_scale: η; None: the fitted one, or 1 if none fits.

    Raises:
        DataError: none of the rows has rewards.
    """
    gaps = label_gaps(rows)
    if not gaps:
        raise DataError(
            "none of the rows has rewards",
            code="data.missing-rewards",
            fix="score the rows first (`rpo-trainer score`)",
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
    """Calibrate each source, and all rows together under `all`, at one η."""
    whole = calibrate(rows, reward_scale)
    sources: dict[str, list[Row]] = {}
    for row in rows:
        if _has_rewards(row):
            sources.setdefault(str(row["source"]), []).append(row)
    found = {"all": whole}
    if len(sources) > 1:
        found |= {name: calibrate(own, whole.reward_scale) for name, own in sources.items()}
    return found
