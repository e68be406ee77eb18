"""Metrics of a policy on held-out prompts and responses, with confidence intervals.

Intervals are 95% bootstraps over prompts (or rows): they cover the choice of the prompts and sampling,
not the training seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo_trainer.data.rows import kwargs_of
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.prompts import EncodedPrompts
from rpo_trainer.rewards.sample import greedy_responses, sample_responses
from rpo_trainer.rewards.sampled_text import Sample
from rpo_trainer.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpo_trainer.data.rows import Row
    from rpo_trainer.recipe import GenerateSpec

_RESAMPLES = 1000
SHOWN_SAMPLES = 200  # prompts in samples.jsonl: enough for histograms, and a page of a few MB


@dataclass(frozen=True)
class Estimate:
    """A mean and the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def estimate(
    values: Sequence[float], seed: int, weights: Sequence[float] | None = None
) -> Estimate:
    """Estimate Σ value / Σ weight, with the 2.5 and 97.5 percentiles over rows drawn with replacement.

    Args:
        values: [n], one per row.
        seed: of the bootstrap.
        weights: [n]; None: 1 each, which results in the mean.
    """
    numerators = np.asarray(values, dtype=np.float64)
    counts = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    n = len(numerators)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, n, n)
        drawn.append(numerators[rows].sum() / counts[rows].sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(numerators.sum() / counts.sum()), float(low), float(high))


# ---------------------------------------------------------------- sampled responses


@dataclass(frozen=True)
class EvalSample:
    """One prompt: its first sampled response, the greedy one if any, and all sampled rewards."""

    id: str
    prompt: Any
    ground_truth: str
    sampled: str
    reward: float | None
    greedy: str | None
    greedy_reward: float | None
    rewards: list[float] | None


@dataclass(frozen=True)
class EvalResult:
    """Rewards of a policy's responses, in the scorer's units; fractions are in [0, 1].

    `reward_low` and `reward_high` bound the interval of `reward_mean`. `exact` is the fraction of responses
    with the verifier's largest reward (None if the scorer has none), `unfinished` the fraction truncated by
    `max_new_tokens`.
    """

    prompts: int
    responses: int
    reward_mean: float
    reward_low: float
    reward_high: float
    exact: float | None
    unfinished: float
    greedy_reward_mean: float | None
    greedy_exact: float | None
    samples: tuple[EvalSample, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "samples": [asdict(sample) for sample in self.samples]}


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    generate: GenerateSpec,
    greedy: bool,
    seed: int,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Sample responses to the prompt of each row.

    Args:
        model: the policy.
        tokenizer: with its chat template.
        rows: with `prompt`.
        generate: the sampling settings.
        greedy: whether to decode greedily too.
        seed: of the sampling.
        ranks: the processes that share the prompts; each gets all responses.

    Returns:
        For each row its `id`, K `responses`, K flags `finished`, and the `greedy` response or None.

    Raises:
        DataError: there are no rows, or a prompt cannot be rendered.
        RecipeError: sampling arguments are out of range.
    """
    if not rows:
        raise DataError(
            "there are no rows to evaluate on",
            code="data.no-rows",
            where="eval.data",
            why="an evaluation is a mean over responses",
            fix="give sources with rows",
        )
    prompts = [row["prompt"] for row in rows]
    common: dict[str, Any] = {
        "max_new_tokens": generate.max_new_tokens,
        "batch_size": generate.batch_size,
        "tools": [row.get("tools") for row in rows],
        "parsed": [row.get("special_tokens") == "parse" for row in rows],
        "template_kwargs": kwargs_of(rows),
        "encoded": EncodedPrompts(),
        "ranks": ranks,
    }
    sampled = sample_responses(
        model, tokenizer, prompts, responses=generate.responses, temperature=generate.temperature,
        top_p=generate.top_p, top_k=generate.top_k, seed=seed, **common,
    )  # fmt: skip
    likeliest: Sequence[Sample | None] = [None] * len(rows)
    if greedy:
        likeliest = greedy_responses(model, tokenizer, prompts, **common)
    return [
        {
            "id": str(row["id"]),
            "responses": [sample.text for sample in each],
            "finished": [sample.finished for sample in each],
            "greedy": None if best is None else best.text,
        }
        for row, each, best in zip(rows, sampled, likeliest, strict=True)
    ]


def to_score(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows with all responses of a policy, the greedy one last."""
    made = []
    for row, answer in zip(rows, answers, strict=True):
        likeliest = [] if answer["greedy"] is None else [answer["greedy"]]
        made.append({**row, "responses": [*answer["responses"], *likeliest]})
    return made


def summarize(
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    rewards: Sequence[Sequence[float]],
    *,
    maximum: float | None,
    seed: int,
    samples: int = SHOWN_SAMPLES,
) -> EvalResult:
    """Compute the metrics of a policy's responses.

    Args:
        rows: the evaluated rows.
        answers: result of `respond`.
        rewards: of the responses of `to_score`, in their order.
        maximum: the reward of a correct response, which no other response gets; None: there is none.
        seed: of the bootstrap.
        samples: number of prompts to show.
    """
    k = len(answers[0]["responses"])
    table = np.array([row[:k] for row in rewards])  # [prompts, K]
    greedy = answers[0]["greedy"] is not None
    likeliest = np.array([row[k] for row in rewards]) if greedy else None
    mean = estimate(table.mean(axis=1).tolist(), seed)
    shown = samples_of(rows, answers, samples, rewards)
    exact = maximum is not None
    return EvalResult(
        prompts=len(rows),
        responses=table.size,
        reward_mean=mean.value,
        reward_low=mean.low,
        reward_high=mean.high,
        exact=float((table == maximum).mean()) if exact else None,
        unfinished=unfinished(answers),
        greedy_reward_mean=None if likeliest is None else float(likeliest.mean()),
        greedy_exact=None
        if likeliest is None or not exact
        else float((likeliest == maximum).mean()),
        samples=shown,
    )


def unfinished(answers: Sequence[Mapping[str, Any]]) -> float:
    """Return the fraction of sampled responses that were truncated by `max_new_tokens`."""
    return float(np.mean([not end for answer in answers for end in answer["finished"]]))


def samples_of(
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    wanted: int = SHOWN_SAMPLES,
    rewards: Sequence[Sequence[float]] | None = None,
) -> tuple[EvalSample, ...]:
    """Return the samples of at most `wanted` rows, evenly spaced: the same rows for every policy."""
    found = []
    for i in shown_rows(len(rows), wanted):
        answer, own = answers[i], None if rewards is None else rewards[i]
        likeliest = answer["greedy"]
        found.append(
            EvalSample(
                id=str(rows[i]["id"]),
                prompt=rows[i]["prompt"],
                ground_truth=str(rows[i].get("ground_truth") or ""),
                sampled=answer["responses"][0],
                reward=None if own is None else float(own[0]),
                greedy=likeliest,
                greedy_reward=None if own is None or likeliest is None else float(own[-1]),
                rewards=None
                if own is None
                else [float(x) for x in own[: len(answer["responses"])]],
            )
        )
    return tuple(found)


def shown_rows(count: int, wanted: int = SHOWN_SAMPLES) -> list[int]:
    """Return the indices of at most `wanted` of `count` rows, evenly spaced."""
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


def win_rate(
    mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int
) -> Estimate:
    """Estimate how often a response of `mine` has a higher reward than one of `theirs`; ties count ½.

    Args:
        mine, theirs: [prompts][K] rewards of responses to the same prompts; all K × K are compared.
        seed: of the bootstrap.
    """
    shares = []
    for own, others in zip(mine, theirs, strict=True):
        differences = np.subtract.outer(np.asarray(own), np.asarray(others))
        shares.append(float(np.mean(np.sign(differences) / 2 + 0.5)))
    return estimate(shares, seed)


# ---------------------------------------------------------------- held-out responses


def preference_figures(
    policy: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]] | None, seed: int
) -> dict[str, Any]:
    """Compute how a policy ranks held-out responses.

    Args:
        policy, baseline: [rows][K] log-probs in nats, the chosen response first.
        seed: of the bootstrap.

    Returns:
        `pairs`, a count; `ranked`, the fraction of pairs whose chosen response is more likely; and
        relative to the baseline `accuracy` (the fraction of pairs whose chosen log-prob rose by more
        than the rejected), `margin` (by how many nats) and `chosen_delta` (the rise of the chosen).
        Further responses of a row count as rejected.
    """
    own = [np.asarray(row) for row in policy]
    found: dict[str, Any] = {"pairs": len(own)}
    found["ranked"] = asdict(estimate([_first_above(row) for row in own], seed))
    if baseline is None:
        return found
    gains = [row - np.asarray(other) for row, other in zip(own, baseline, strict=True)]
    margins = [float(gain[0] - gain[1:].mean()) for gain in gains]
    found["accuracy"] = asdict(estimate([_first_above(gain) for gain in gains], seed))
    found["margin"] = asdict(estimate(margins, seed))
    found["chosen_delta"] = asdict(estimate([float(gain[0]) for gain in gains], seed))
    return found


def _first_above(values: Any) -> float:
    return float(np.mean(np.sign(values[0] - values[1:]) / 2 + 0.5))


def nll_figures(
    logps: Sequence[float], tokens: Sequence[int], sources: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return the negative log-likelihood per trained token, in nats, and the number of `rows` by source."""
    found = {}
    for source in dict.fromkeys(sources):
        rows = [i for i, own in enumerate(sources) if own == source]
        mean = estimate([-logps[i] for i in rows], seed, [tokens[i] for i in rows])
        found[source] = {**asdict(mean), "rows": len(rows)}
    return found
