"""Sampling uses the tokens that training uses, and ends where training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_trainer.data import Audit, end_token_ids, set_chat_template, tokenize_rows
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.rewards.sample import Sample, greedy_responses, sample_responses
from tests.rewards.policies import TEMPLATE, llama, next_token_model, plain_greedy


def test_tools_are_written_where_the_template_writes_them() -> None:
    model, tokenizer = llama(max_position_embeddings=256), character_tokenizer()
    tokenizer.chat_template = "{% if tools %}T{{ tools[0].name }} {% endif %}" + TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two")]
    tools = [[{"name": "clock"}], None]
    expected = [plain_greedy(model, text, 6) for text in ("Tclock u:one\na:", "u:two\na:")]
    settings = {"max_new_tokens": 6, "tools": tools}
    assert greedy_responses(model, tokenizer, prompts, **settings) == expected
    (first, second) = sample_responses(
        model, tokenizer, prompts, responses=1, top_k=1, batch_size=1, **settings
    )
    assert [first[0], second[0]] == expected


def test_the_end_of_a_turn_ends_a_response() -> None:
    model = next_token_model({":": {"a": 1.0}, "a": {"<unk>": 1.0}, "<unk>": {"b": 1.0}})
    tokenizer = character_tokenizer()
    # A template whose turns end with a different token than the end token.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<unk>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    model.generation_config.eos_token_id = None
    assert end_token_ids(tokenizer) == [2, 3]
    messages = [[{"role": "user", "content": "x"}]]
    assert greedy_responses(model, tokenizer, messages, max_new_tokens=5) == [Sample("a", True)]


def seen_tokens(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[list[int]]:
    """The prompts that `generate` receives, without their padding, in order."""
    seen: list[list[int]] = []
    generate = model.generate

    def spy(input_ids: Any, attention_mask: Any, **settings: Any) -> Any:
        seen.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)
        )
        return generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(model, "generate", spy)
    return seen


def test_sampling_sees_the_tokens_that_training_sees(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_dir / "data" / "fixtures" / "models" / "stories260K"
    tokenizer = set_chat_template(AutoTokenizer.from_pretrained(folder), "plain")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    prompts: list[Any] = [
        "Once upon a time, ",
        "A text that says <s> and </s> ",
        [{"role": "user", "content": "Tell me of Lily."}],
        [
            {"role": "system", "content": "Be short </s>."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Where is the cat?"},
        ],
        [{"role": "user", "content": "Look!"}],
    ]
    of_prompt = [None, None, None, None, tools]
    seen = seen_tokens(monkeypatch, model)
    found = sample_responses(
        model, tokenizer, prompts, responses=2, max_new_tokens=12, batch_size=2, tools=of_prompt
    )
    rows = [
        {
            "id": str(i), "source": "x", "prompt": prompt, "rewards": None,
            "responses": [" One.", " Two."], **({"tools": given} if given else {}),
        }
        for i, (prompt, given) in enumerate(zip(prompts, of_prompt, strict=True))
    ]  # fmt: skip
    examples = tokenize_rows(
        rows, tokenizer, kind="pair", max_length=256, truncation="drop", audit=Audit()
    )
    for i, example in enumerate(examples):
        for ids in example["response_ids"]:
            whole = example["prompt_ids"] + ids
            (sampled_behind,) = {tuple(s) for s in seen if whole[: len(s)] == s}
            assert sampled_behind.count(tokenizer.bos_token_id) == 1
            trained = example["response_mask"][0].index(1)
            assert len(sampled_behind) == len(example["prompt_ids"]) + trained, i
    assert all(len(each) == 2 for each in found)


def test_responses_that_training_cannot_give_back_are_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = next_token_model(
        {":": {"a": 1.0}, "a": {"<unk>": 1.0}, "<unk>": {"b": 1.0}, "b": {"</s>": 1.0}}
    )
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [[{"role": "user", "content": text}] for text in "xyz"]
    found = sample_responses(
        model, tokenizer, messages, responses=2, max_new_tokens=5, batch_size=2
    )
    assert found == [[Sample("ab", True)] * 2] * 3
    (record,) = [each for each in caplog.records if each.name.endswith("rewards.sampled_text")]
    assert record.args is not None and record.args[:2] == (6, 6)
