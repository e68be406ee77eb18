"""On a GPU, greedy responses equal those of `generate`; sampled ones do not depend on the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rpo_trainer.rewards.sample import greedy_responses, sample_responses
from tests.small_models import make_model

PROMPTS = ["1+1=", "what is twelve", "a", "the sum of 3 and 4 is", "b c d e", "zz"]
NEW = 24


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    return make_model(hidden_size=64, vocab_size=len(tokenizer)).cuda()


def test_greedy_responses_are_those_of_generate(policy: Any, tokenizer: Any) -> None:
    found = greedy_responses(policy, tokenizer, PROMPTS, max_new_tokens=NEW, batch_size=4)
    for prompt, sample in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device="cuda")
        out = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample.text == text


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_are_those_of_the_cpu(policy: Any, tokenizer: Any, temperature: float) -> None:
    """The random numbers are a function of seed and key; float32 arithmetic changes few of the tokens."""

    def sample(model: Any, **settings: Any) -> list[str]:
        found = sample_responses(
            model, tokenizer, PROMPTS, responses=3, max_new_tokens=NEW, temperature=temperature,
            seed=1, **{"batch_size": 64, **settings},
        )  # fmt: skip
        return [response.text for samples in found for response in samples]

    ours, cpu = sample(policy), sample(copy.deepcopy(policy).cpu())
    assert sum(a == b for a, b in zip(ours, cpu, strict=True)) >= 17  # of 18
    assert ours == sample(policy)
    assert sum(a == b for a, b in zip(ours, sample(policy, batch_size=3), strict=True)) >= 17


def test_a_model_in_bfloat16_is_sampled(policy: Any, tokenizer: Any) -> None:
    found = sample_responses(
        copy.deepcopy(policy).bfloat16(),
        tokenizer,
        PROMPTS,
        responses=2,
        max_new_tokens=NEW,
        seed=1,
    )
    assert [len(samples) for samples in found] == [2] * len(PROMPTS)
