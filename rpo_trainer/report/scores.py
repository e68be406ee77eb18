"""Held-out figures of a stage, with their intervals and display names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rpo_trainer.stages.record import EstimateRecord, EvaluationRecord, PreferencesRecord

_Z95 = 1.959964  # the 0.975 quantile of the normal distribution
# The figures that a preference stage is judged by, in order of preference.
MAIN_FIGURES = {
    "reward_sampled": "mean reward of sampled responses",
    "reward_greedy": "mean reward of greedy responses",
    "exact_sampled": "exact match of sampled responses",
    "exact_greedy": "exact match of greedy responses",
}


@dataclass(frozen=True)
class Measure:
    """A mean, with the bounds of its 95% interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Measure) -> bool:
        """Whether the two intervals overlap; False if either has no interval."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Figure:
    """A measure with its key and name; `higher`: whether higher is better, None if unknown."""

    key: str
    name: str
    measure: Measure | None
    higher: bool | None = True
    digits: int = 3


@dataclass(frozen=True)
class EvalScores:
    """Held-out figures after a stage; None if not measured.

    Rewards are in the verifier's units, exact matches are fractions in [0, 1], `unfinished` is the
    fraction of sampled responses truncated at `max_new_tokens`, `nll` is in nats per token.
    """

    exact_greedy: Measure | None = None
    exact_sampled: Measure | None = None
    reward_greedy: Measure | None = None
    reward_sampled: Measure | None = None
    nll: Measure | None = None
    unfinished: float | None = None
    prompts: int | None = None
    baseline: str | None = None
    win_rate: Measure | None = None
    measure: str | None = None  # key of prompts, sampling and scorer
    others: tuple[Figure, ...] = ()  # held-out pairs, NLL by source, lm-eval tasks

    def all(self) -> list[Figure]:
        """Return all figures that were measured, in display order."""
        named = [
            Figure("exact_greedy", "exact match, greedy", self.exact_greedy),
            Figure("exact_sampled", "exact match, sampled", self.exact_sampled),
            Figure("reward_greedy", "mean reward, greedy", self.reward_greedy, digits=2),
            Figure("reward_sampled", "mean reward, sampled", self.reward_sampled, digits=2),
            Figure(
                "win_rate", f"win rate against {self.baseline or 'the baseline'}", self.win_rate
            ),
            Figure("nll", "NLL", self.nll, higher=False),
        ]
        return [figure for figure in (*named, *self.others) if figure.measure is not None]

    def compares(self, other: EvalScores) -> bool:
        """Whether both have the same main figure, measured with the same prompts, sampling and scorer."""
        figure, other_figure = self.main(), other.main()
        if figure is None or other_figure is None:
            return False
        return figure[0] == other_figure[0] and self.measure == other.measure

    def main(self) -> tuple[str, Measure] | None:
        """Return the first measured figure of MAIN_FIGURES, with its key."""
        found = ((key, getattr(self, key)) for key in MAIN_FIGURES)
        return next(((key, measure) for key, measure in found if measure is not None), None)


def one_measure(scores: Iterable[EvalScores]) -> bool:
    """Whether all response figures were measured with the same prompts, sampling and scorer."""
    return len({own.measure for own in scores if own.main() is not None}) < 2


@dataclass(frozen=True)
class Agreement:
    """Held-out figures of a reward model; empty for other stages.

    Attributes:
        accuracy: pair accuracy, the fraction of pairs whose chosen response has the higher reward.
        correlations: Pearson correlation by attribute; `gap` for pairs, `reward` for the weighted sum.
        calibration: by attribute, (mean prediction, mean observation) of each bin.
    """

    accuracy: Measure | None = None
    correlations: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def correlation(self) -> float | None:
        """Return the main correlation: of the reward, else the gap, else the first attribute."""
        for name in ("reward", "gap", *self.correlations):
            if name in self.correlations:
                return self.correlations[name]
        return None


def read_agreement(record: EvaluationRecord) -> Agreement:
    """Read how a reward model agrees with held-out rows."""
    tables = record.calibration or {}
    return Agreement(
        accuracy=_fraction(record.accuracy, sum(row.count for row in tables.get("pairs", ()))),
        correlations={
            name.removeprefix("pearson/"): value
            for name, value in record.agreement.items()
            if name.startswith("pearson/")
        },
        calibration={
            name: [(row.predicted, row.observed) for row in table]
            for name, table in tables.items()
            if table
        },
    )


def read_scores(record: EvaluationRecord) -> EvalScores:
    """Read the figures of held-out responses, pairs and rows."""
    return EvalScores(
        exact_greedy=_fraction(record.greedy_exact, record.prompts),
        exact_sampled=_fraction(record.exact, record.prompts),
        reward_greedy=_measure(record.greedy_reward_mean),
        reward_sampled=_measure(record.reward_mean, record.reward_low, record.reward_high),
        nll=_measure(record.nll),
        unfinished=record.unfinished,
        prompts=record.prompts,
        baseline=record.baseline,
        win_rate=_estimate(record.win_rate),
        measure=record.measure,
        others=tuple(_others(record)),
    )


def _others(record: EvaluationRecord) -> Iterator[Figure]:
    pairs = record.preferences or PreferencesRecord()
    against = f"against {record.baseline or 'the baseline'}"
    of_pairs = (
        ("ranked", "held-out pairs: chosen has the higher log-prob", pairs.ranked, 3),
        ("accuracy", f"held-out pair accuracy {against}", pairs.accuracy, 3),
        ("margin", f"log-ratio gap {against}, nats", pairs.margin, 2),
        ("chosen_delta", f"log-prob change of chosen {against}, nats", pairs.chosen_delta, 2),
    )
    for key, name, estimate, digits in of_pairs:
        if estimate is not None:
            yield Figure(f"preferences.{key}", name, _estimate(estimate), digits=digits)
    for source, nll in (record.nll_by_source or {}).items():
        yield Figure(f"nll.{source}", f"NLL, {source}", _estimate(nll), higher=False)
    for task, metrics in (record.lm_eval or {}).items():
        for metric, found in metrics.items():
            name = f"{task}: {metric}"
            yield Figure(f"{task}.{metric}", name, _estimate(found), found.higher_is_better)


def _estimate(record: EstimateRecord | None) -> Measure | None:
    return None if record is None else Measure(record.value, record.low, record.high)


def _measure(
    value: float | None, low: float | None = None, high: float | None = None
) -> Measure | None:
    return None if value is None else Measure(value, low, high)


def _fraction(value: float | None, prompts: int | None) -> Measure | None:
    """Return a fraction with the Wilson interval for one trial per prompt or pair.

    With several responses per prompt the interval is conservative: the mean over the responses to a
    prompt varies no more than a single response.
    """
    if value is None or not prompts:
        return _measure(value)
    spread = _Z95**2 / prompts
    middle = (value + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(value * (1 - value) / prompts + spread / (4 * prompts))
    return Measure(value, max(0.0, middle - half), min(1.0, middle + half))
