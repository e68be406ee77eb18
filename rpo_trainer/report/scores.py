"""The figures of an evaluation, read out of a stage's `eval` record in chain.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rpo_trainer.report.values import count, mapping, number

_Z95 = 1.959964  # the 0.975 quantile of the normal distribution


@dataclass(frozen=True)
class Measure:
    """A mean, with the bounds of its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Measure) -> bool:
        """Whether the two intervals share a value; False where one of them has no interval."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Figure:
    """A named measure; `higher` says whether more of it is better, None: nobody knows."""

    name: str
    measure: Measure | None
    higher: bool | None = True
    digits: int = 3


@dataclass(frozen=True)
class EvalScores:
    """Held-out figures after a stage; None for what was not measured.

    Rewards are in the verifier's units, exact matches are shares in [0, 1], `unfinished` is the
    share of sampled responses cut by `max_new_tokens`, `nll` is in nats.
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
    measure: str | None = None  # figures of responses compare where this is the same
    others: tuple[Figure, ...] = ()  # held-out pairs, NLL by source, tasks of lm-eval

    def all(self) -> list[Figure]:
        """Everything that was measured, in reading order."""
        named = [
            Figure("exact match, greedy", self.exact_greedy),
            Figure("exact match, sampled", self.exact_sampled),
            Figure("mean reward, greedy", self.reward_greedy, digits=2),
            Figure("mean reward, sampled", self.reward_sampled, digits=2),
            Figure(f"win rate against {self.baseline or 'the baseline'}", self.win_rate),
            Figure("NLL", self.nll, higher=False),
        ]
        return [figure for figure in (*named, *self.others) if figure.measure is not None]

    def compares(self, other: EvalScores) -> bool:
        """Whether both have the same main figure, of the same prompts, sampling and scorer."""
        mine, theirs = self.main(), other.main()
        if mine is None or theirs is None:
            return False
        return mine[0] == theirs[0] and self.measure == other.measure

    def main(self) -> tuple[str, Measure] | None:
        """The figure that tells best whether a preference stage helped, and its name."""
        candidates = (
            ("mean reward of sampled responses", self.reward_sampled),
            ("mean reward of greedy responses", self.reward_greedy),
            ("exact match of sampled responses", self.exact_sampled),
            ("exact match of greedy responses", self.exact_greedy),
        )
        return next(((name, found) for name, found in candidates if found is not None), None)


def one_measure(scores: Iterable[EvalScores]) -> bool:
    """Whether all figures of responses are of the same prompts, sampling and scorer."""
    return len({own.measure for own in scores if own.main() is not None}) < 2


def read_scores(record: Mapping[str, Any]) -> EvalScores:
    """From `EvalResult.as_dict()` and `nll`: a number, or one for each source (then their mean)."""
    prompts = count(record.get("prompts"))
    named = record.get("baseline")
    baseline = named if isinstance(named, str) else None
    return EvalScores(
        exact_greedy=share(record.get("greedy_exact"), prompts),
        exact_sampled=share(record.get("exact"), prompts),
        reward_greedy=_measure(record.get("greedy_reward_mean")),
        reward_sampled=_measure(
            record.get("reward_mean"), record.get("reward_low"), record.get("reward_high")
        ),
        nll=_nll(record.get("nll")),
        unfinished=number(record.get("unfinished")),
        prompts=prompts,
        baseline=baseline,
        win_rate=_estimate(record.get("win_rate")),
        measure=None if record.get("measure") is None else str(record["measure"]),
        others=tuple(_others(record, baseline)),
    )


def _others(record: Mapping[str, Any], baseline: str | None) -> Iterator[Figure]:
    pairs, against = mapping(record.get("preferences")), f"against {baseline or 'the baseline'}"
    names = {
        "ranked": ("pairs: chosen likelier", 3),
        "accuracy": (f"pairs right {against}", 3),
        "margin": (f"margin {against}, nats", 2),
        "chosen_delta": (f"log-prob of chosen {against}, nats", 2),
    }
    for key, (name, digits) in names.items():
        if (measure := _estimate(pairs.get(key))) is not None:
            yield Figure(name, measure, digits=digits)
    for source, entry in mapping(record.get("nll_by_source")).items():
        if (measure := _estimate(entry)) is not None:
            yield Figure(f"NLL, {source}", measure, higher=False)
    for task, metrics in mapping(record.get("lm_eval")).items():
        for metric, entry in mapping(metrics).items():
            if (measure := _estimate(entry)) is not None:
                better = mapping(entry).get("higher_is_better")
                yield Figure(
                    f"{task}: {metric}", measure, better if isinstance(better, bool) else None
                )


def _estimate(record: Any) -> Measure | None:
    entry = mapping(record)
    return _measure(entry.get("value"), entry.get("low"), entry.get("high"))


def _measure(value: Any, low: Any = None, high: Any = None) -> Measure | None:
    found = number(value)
    return None if found is None else Measure(found, number(low), number(high))


def share(value: Any, prompts: int | None) -> Measure | None:
    """A share with Wilson's interval for one trial per prompt, or pair.

    For several responses a prompt it is too wide rather than too narrow: the responses to one
    prompt are not independent, but their mean varies no more than one of them does.
    """
    found = number(value)
    if found is None or not prompts:
        return _measure(value)
    spread = _Z95**2 / prompts
    middle = (found + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(found * (1 - found) / prompts + spread / (4 * prompts))
    return Measure(found, max(0.0, middle - half), min(1.0, middle + half))


def _nll(found: Any) -> Measure | None:
    direct = number(found)
    if direct is not None:
        return Measure(direct)
    by_source = mapping(found)
    if "mean" in by_source:
        return _measure(by_source["mean"], by_source.get("low"), by_source.get("high"))
    values = [value for value in map(number, by_source.values()) if value is not None]
    return Measure(sum(values) / len(values)) if values else None
