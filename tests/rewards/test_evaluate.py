"""Evaluation: means and intervals that can be computed by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_trainer.data.quickstart import GENERAL, character_tokenizer
from rpo_trainer.data.tasks import load_task
from rpo_trainer.errors import DataError
from rpo_trainer.rewards import evaluate
from rpo_trainer.rewards.evaluate import (
    EvalResult,
    estimate,
    nll_figures,
    preference_figures,
    respond,
    summarize,
    to_score,
    win_rate,
)
from rpo_trainer.rewards.sample import Sample
from rpo_trainer.rewards.verifiers import get_verifier, score_rows
from tests.raising import raises


def spec(**changes: Any) -> Any:
    values = {"responses": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return SimpleNamespace(**{**values, "max_new_tokens": 6, "batch_size": 16, **changes})


def rows_with_truth(*truths: str) -> list[dict[str, Any]]:
    return [
        {"id": f"row-{i}", "prompt": f"say {truth}: ", "ground_truth": truth}
        for i, truth in enumerate(truths)
    ]


def scripted(
    monkeypatch: pytest.MonkeyPatch, sampled: list[list[Sample]], greedy: list[str]
) -> None:
    monkeypatch.setattr(evaluate, "sample_responses", lambda *_, **__: sampled)
    monkeypatch.setattr(
        evaluate, "greedy_responses", lambda *_, **__: [Sample(text, True) for text in greedy]
    )


def run(
    rows: list[dict[str, Any]],
    *,
    model: Any = None,
    tokenizer: Any = None,
    generate: Any = None,
    greedy: bool = True,
    seed: int = 0,
    samples: int = 8,
) -> EvalResult:
    """Responses of a policy, scored by the quickstart's verifier."""
    judge = get_verifier("partial_match")
    generate = generate or spec()
    answers = respond(model, tokenizer, rows, generate=generate, greedy=greedy, seed=seed)
    rewards = [row["rewards"] for row in score_rows(to_score(rows, answers), judge)]
    return summarize(rows, answers, rewards, maximum=judge.maximum, seed=seed, samples=samples)


def test_means_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = [
        [Sample("ab", True), Sample("ax", True)],  # 5, 2
        [Sample("cd", True), Sample("xx", False)],  # 5, 0
    ]
    scripted(monkeypatch, sampled, ["ab", "cx"])  # 5, 2
    result = run(rows_with_truth("ab", "cd"))
    assert (result.prompts, result.responses) == (2, 4)
    assert result.reward_mean == pytest.approx(3.0)
    assert result.exact == pytest.approx(0.5)
    assert result.unfinished == pytest.approx(0.25)
    assert result.greedy_reward_mean == pytest.approx(3.5)
    assert result.greedy_exact == pytest.approx(0.5)
    first = result.samples[0]
    assert (first.id, first.prompt, first.ground_truth) == ("row-0", "say ab: ", "ab")
    assert (first.sampled, first.reward, first.greedy, first.greedy_reward) == ("ab", 5, "ab", 5)


def test_the_interval_is_over_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the prompts always right, half always wrong: the mean of n prompts has a standard
    # error of 2.5 / sqrt(n), however many responses a prompt has.
    rows = rows_with_truth(*(["ab"] * 400))
    sampled = [[Sample("ab" if i % 2 else "xx", True)] * 4 for i in range(400)]
    scripted(monkeypatch, sampled, [])
    result = run(rows, greedy=False)
    half_width = 1.96 * 2.5 / np.sqrt(400)
    assert result.reward_low == pytest.approx(2.5 - half_width, abs=0.04)
    assert result.reward_high == pytest.approx(2.5 + half_width, abs=0.04)
    assert run(rows, greedy=False) == result


def test_without_greedy_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[Sample("ab", True)]], [])
    result = run(rows_with_truth("ab"), greedy=False)
    assert result.greedy_exact is None
    assert result.greedy_reward_mean is None
    assert result.samples[0].greedy is None


def test_the_same_evenly_spaced_rows_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with_truth(*(f"{i:02}" for i in range(20)))
    scripted(monkeypatch, [[Sample("00", True)]] * 20, [])
    shown = run(rows, greedy=False, samples=4).samples
    assert [sample.id for sample in shown] == ["row-0", "row-5", "row-10", "row-15"]
    scripted(monkeypatch, [[Sample("00", True)]] * 3, [])
    assert len(run(rows[:3], greedy=False, samples=4).samples) == 3


def test_a_real_policy_end_to_end() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    model, tokenizer = LlamaForCausalLM(config), character_tokenizer()
    rows = load_task(GENERAL, "heldout", 12, seed=0)
    results = [run(rows, model=model, tokenizer=tokenizer, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0].samples != results[2].samples
    assert results[0].greedy_reward_mean == results[2].greedy_reward_mean
    assert results[0].reward_low <= results[0].reward_mean <= results[0].reward_high
    assert 0 <= results[0].reward_mean <= 5
    as_dict = results[0].as_dict()
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict


def test_unusable_input_is_refused() -> None:
    with raises("data.no-rows", DataError, where="eval.data"):
        run([])


def test_an_estimate_is_a_ratio_of_sums() -> None:
    found = estimate([6.0, 2.0], seed=0, weights=[3, 1])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    rows = [0.0, 1.0] * 200
    plain = estimate(rows, seed=0)
    half_width = 1.96 * 0.5 / np.sqrt(400)
    assert plain.value == 0.5
    assert plain.low == pytest.approx(0.5 - half_width, abs=0.01)
    assert plain.high == pytest.approx(0.5 + half_width, abs=0.01)
    assert estimate(rows, seed=0) == plain != estimate(rows, seed=1)


def test_a_win_rate_compares_all_responses_to_a_prompt() -> None:
    # 3 of 4 comparisons won; then one tie and one lost of two.
    found = win_rate([[5.0, 1.0], [2.0]], [[0.0, 3.0], [2.0, 4.0]], seed=0)
    assert found.value == pytest.approx((0.75 + 0.25) / 2)
    assert (found.low, found.high) == (0.25, 0.75)
    assert win_rate([[1.0]] * 3, [[1.0]] * 3, seed=0).value == 0.5


def test_preferences_against_a_baseline() -> None:
    policy = [[-10.0, -12.0], [-20.0, -15.0, -30.0]]
    baseline = [[-9.0, -10.0], [-24.0, -15.0, -30.0]]
    found = preference_figures(policy, baseline, seed=0)
    # Gains: -1 and -2; then +4, 0 and 0.
    assert found["pairs"] == 2
    assert found["ranked"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert found["accuracy"]["value"] == 1.0
    assert found["margin"]["value"] == pytest.approx((1 + 4) / 2)
    assert found["chosen_delta"]["value"] == pytest.approx((-1 + 4) / 2)
    assert (found["margin"]["low"], found["margin"]["high"]) == (1.0, 4.0)
    assert set(preference_figures(policy, None, seed=0)) == {"pairs", "ranked"}
    same = preference_figures(policy, policy, seed=0)
    assert same["accuracy"]["value"] == 0.5 and same["margin"]["value"] == 0.0


def test_nll_is_over_the_tokens_of_each_source() -> None:
    found = nll_figures([-6.0, -2.0, -8.0], [3, 1, 2], ["a", "a", "b"], seed=0)
    assert found["a"] == {"value": 2.0, "low": 2.0, "high": 2.0, "rows": 2}
    assert found["b"]["value"] == 4.0 and found["b"]["rows"] == 1
