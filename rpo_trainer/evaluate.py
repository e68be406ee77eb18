"""A policy's responses on held-out prompts, scored by a verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo_trainer.errors import DataError
from rpo_trainer.rewards.generate import Gather, Sample, greedy_responses, sample_responses
from rpo_trainer.rewards.verifiers import Verifier, check_rows, get_verifier, score_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpo_trainer.recipe.data_schema import GenerateSpec

_RESAMPLES = 1000


@dataclass(frozen=True)
class EvalSample:
    """One prompt for a reader: the first sampled response, and the greedy one if there is one."""

    id: str
    prompt: Any
    ground_truth: str
    sampled: str
    reward: float
    greedy: str | None
    greedy_reward: float | None


@dataclass(frozen=True)
class EvalResult:
    """Rewards of a policy's responses, in the verifier's units; shares are in [0, 1].

    `reward_low` and `reward_high` bound a 95 % bootstrap interval of `reward_mean` over prompts:
    it tells of the choice of prompts and of sampling, not of the training seed. `exact` counts
    responses with the verifier's largest reward, `unfinished` those cut by `max_new_tokens`.
    """

    verifier: str
    prompts: int
    responses: int
    reward_mean: float
    reward_low: float
    reward_high: float
    exact: float
    unfinished: float
    greedy_reward_mean: float | None
    greedy_exact: float | None
    samples: tuple[EvalSample, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, for JSON."""
        return {**asdict(self), "samples": [asdict(sample) for sample in self.samples]}


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    generate: GenerateSpec,
    verifier: str,
    allow_code_execution: bool = False,
    greedy: bool = True,
    seed: int = 0,
    samples: int = 8,
    shard: tuple[int, int] = (0, 1),
    gather: Gather = lambda found: found,
) -> EvalResult:
    """Scores sampled responses, and greedy ones if asked, to prompts with a known answer.

    Args:
        rows: with `id`, `prompt` and what the verifier reads.
        generate: how to sample; its K responses a prompt make the mean less noisy.
        verifier: one of `rpo_trainer.rewards.verifiers.VERIFIERS`.
        allow_code_execution: needed for the verifier `asserts`.
        greedy: also decode greedily.
        seed: of sampling and of the bootstrap.
        samples: rows shown as they are, evenly spaced: the same ones for every policy.
        shard, gather: see `rpo_trainer.rewards.generate.sample_responses`.

    Raises:
        DataError: no rows, or rows without ground truth.
        RecipeError: unknown verifier, or sampling arguments out of range.
    """
    if not rows:
        raise DataError("there are no rows to evaluate on", where="eval.data")
    judge = get_verifier(verifier, allow_code_execution=allow_code_execution)
    check_rows(rows, judge)
    prompts = [row["prompt"] for row in rows]
    tools = [row.get("tools") for row in rows]
    sampled = sample_responses(
        model,
        tokenizer,
        prompts,
        responses=generate.responses,
        temperature=generate.temperature,
        top_p=generate.top_p,
        top_k=generate.top_k,
        max_new_tokens=generate.max_new_tokens,
        batch_size=generate.batch_size,
        seed=seed,
        tools=tools,
        shard=shard,
        gather=gather,
    )
    likeliest = None
    if greedy:
        likeliest = greedy_responses(
            model,
            tokenizer,
            prompts,
            max_new_tokens=generate.max_new_tokens,
            batch_size=generate.batch_size,
            tools=tools,
            shard=shard,
            gather=gather,
        )
    return _result(rows, judge, sampled, likeliest, seed, samples)


def _result(
    rows: Sequence[dict[str, Any]],
    judge: Verifier,
    sampled: list[list[Sample]],
    likeliest: list[Sample] | None,
    seed: int,
    samples: int,
) -> EvalResult:
    rewards = _rewards(rows, judge, sampled)  # [prompts, K]
    low, high = _bootstrap_interval(rewards.mean(axis=1), seed)
    greedy_rewards = None
    if likeliest is not None:
        greedy_rewards = _rewards(rows, judge, [[sample] for sample in likeliest])[:, 0]
    shown = [
        EvalSample(
            id=str(rows[i]["id"]),
            prompt=rows[i]["prompt"],
            ground_truth=str(rows[i].get("ground_truth") or ""),
            sampled=sampled[i][0].text,
            reward=float(rewards[i, 0]),
            greedy=None if likeliest is None else likeliest[i].text,
            greedy_reward=None if greedy_rewards is None else float(greedy_rewards[i]),
        )
        for i in _evenly_spaced(len(rows), samples)
    ]
    return EvalResult(
        verifier=judge.name,
        prompts=len(rows),
        responses=rewards.size,
        reward_mean=float(rewards.mean()),
        reward_low=low,
        reward_high=high,
        exact=float((rewards == judge.maximum).mean()),
        unfinished=float(np.mean([not one.finished for each in sampled for one in each])),
        greedy_reward_mean=None if greedy_rewards is None else float(greedy_rewards.mean()),
        greedy_exact=(
            None if greedy_rewards is None else float((greedy_rewards == judge.maximum).mean())
        ),
        samples=tuple(shown),
    )


def _rewards(
    rows: Sequence[dict[str, Any]], judge: Verifier, found: list[list[Sample]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[prompts, K] rewards."""
    with_responses = [
        {**row, "responses": [sample.text for sample in each]}
        for row, each in zip(rows, found, strict=True)
    ]
    return np.array([row["rewards"] for row in score_rows(with_responses, judge)])


def _bootstrap_interval(
    means: np.ndarray[Any, np.dtype[np.float64]], seed: int
) -> tuple[float, float]:
    """2.5 % and 97.5 % points of the mean over prompts drawn again with replacement."""
    rng = np.random.default_rng(seed)
    n = len(means)
    drawn = [means[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _evenly_spaced(n: int, wanted: int) -> list[int]:
    return [i * n // wanted for i in range(wanted)] if n > wanted else list(range(n))
