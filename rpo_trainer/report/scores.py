"""The figures of an evaluation, read out of a stage's `eval` record in chain.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    def main(self) -> tuple[str, Measure] | None:
        """The figure that tells best whether a preference stage helped, and its name."""
        candidates = (
            ("mean reward of sampled responses", self.reward_sampled),
            ("mean reward of greedy responses", self.reward_greedy),
            ("exact match of sampled responses", self.exact_sampled),
            ("exact match of greedy responses", self.exact_greedy),
        )
        return next(((name, found) for name, found in candidates if found is not None), None)


def read_scores(record: Mapping[str, Any]) -> EvalScores:
    """From `EvalResult.as_dict()` and `nll`: a number, or one for each source (then their mean)."""
    prompts = count(record.get("prompts"))
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
    )


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
