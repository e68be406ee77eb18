"""Prompts are encoded once, by the process that samples for them, with one renderer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import encode, encode_prompt
from rpo_trainer.data.encode import PromptEncoder
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import GenerateSpec
from rpo_trainer.rewards.evaluate import respond
from rpo_trainer.rewards.policies import LocalPolicy, sample_rows
from rpo_trainer.rewards.prompts import EncodedPrompts, Prompts
from rpo_trainer.rewards.sample import iter_responses, sample_responses
from tests.raising import raises
from tests.rewards.policies import PROMPTS, TEMPLATE, llama

TALKS = [[{"role": "user", "content": "ab" * (1 + 5 * i % 7)}] for i in range(12)]
SETTINGS: dict[str, Any] = {"responses": 2, "max_new_tokens": 4, "batch_size": 4, "seed": 3}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the prompts that were encoded, in order."""
    indices: list[int] = []
    own = Prompts.encoded

    def spied(self: Prompts, index: int, encoder: PromptEncoder) -> list[int]:
        indices.append(index)
        return own(self, index, encoder)

    monkeypatch.setattr(Prompts, "encoded", spied)
    return indices


def chat_tokenizer() -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_rank_encodes_only_its_own_prompts(world: int, encoded: list[int]) -> None:
    model, tokenizer = llama(), chat_tokenizer()
    whole = sample_responses(model, tokenizer, TALKS, **SETTINGS)
    found: dict[int, Any] = {}
    for rank in range(world):
        encoded.clear()
        every = range(len(TALKS))
        own = dict(iter_responses(model, tokenizer, TALKS, every, shard=(rank, world), **SETTINGS))
        assert sorted(encoded) == sorted(own) and found.keys().isdisjoint(own)
        found |= own
    assert [found[index] for index in range(len(TALKS))] == whole


def test_only_the_batches_of_wanted_prompts_are_encoded(encoded: list[int]) -> None:
    model, tokenizer = llama(), chat_tokenizer()
    whole = sample_responses(model, tokenizer, TALKS, **SETTINGS)
    encoded.clear()
    assert dict(iter_responses(model, tokenizer, TALKS, {5}, **SETTINGS)) == {5: whole[5]}
    assert 5 in encoded and len(encoded) == SETTINGS["batch_size"] // SETTINGS["responses"]


@pytest.mark.parametrize(("same", "times"), [(True, 1), (False, 2)])
def test_policies_that_share_a_tokenizer_encode_a_prompt_once(
    same: bool, times: int, encoded: list[int], tmp_path: Path
) -> None:
    rows = [{"id": str(i), "source": "s", "prompt": talk} for i, talk in enumerate(TALKS)]
    tokenizers = [chat_tokenizer()] * 2 if same else [chat_tokenizer(), chat_tokenizer()]
    spec = GenerateSpec(responses=2, max_new_tokens=4, batch_size=4)

    def sampled(name: str, shared: EncodedPrompts | None) -> list[Any]:
        def policy(place: int) -> LocalPolicy:
            load: Callable[[], Any] = lambda: (llama(place), tokenizers[place])  # noqa: E731
            return LocalPolicy(f"p{place}", load, spec, weights=str(place), seed=0, encoded=shared)

        return sample_rows(tmp_path / name, rows, [policy(0), policy(1)], spec, seed=0)

    found = sampled("shared.jsonl", EncodedPrompts())
    assert sorted(encoded) == sorted([*range(len(rows))] * times)
    assert found == sampled("apart.jsonl", None)


def test_an_evaluation_encodes_a_prompt_once(encoded: list[int]) -> None:
    rows = [{"id": str(i), "prompt": talk} for i, talk in enumerate(TALKS)]
    spec = GenerateSpec(responses=1, max_new_tokens=4)
    respond(llama(), chat_tokenizer(), rows, generate=spec, greedy=True, seed=0)
    assert sorted(encoded) == [*range(len(rows))]


def test_one_renderer_for_all_prompts_of_a_set_of_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    renderer = encode.ChatRenderer

    def spied(*args: Any) -> Any:
        made.append(args)
        return renderer(*args)

    monkeypatch.setattr(encode, "ChatRenderer", spied)
    tokenizer = chat_tokenizer()
    prompts = PromptEncoder(tokenizer)
    ids = [prompts.ids(talk) for talk in TALKS]
    assert len(made) == 1
    assert ids == [encode_prompt(tokenizer, talk) for talk in TALKS]
    assert [prompts.ids(text) for text in PROMPTS] == [
        encode_prompt(tokenizer, text) for text in PROMPTS
    ]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("parsed", [True, False])
@pytest.mark.parametrize("content", ["a b", "<s>a", "a</s>b", "", " </s> ", "é漢<unk>"])
def test_ids_without_offsets_are_those_of_training(content: str, parsed: bool, bos: bool) -> None:
    """`prompt_ids` leaves out the offsets, and has the ids of `encode`."""
    tokenizer = chat_tokenizer()
    if not bos:
        tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    encoder = encode.Encoder(tokenizer)
    rendered = encode.ChatRenderer(tokenizer).prompt(
        [{"role": "user", "content": content}], parsed=parsed
    )
    assert encoder.prompt_ids(rendered) == encoder.encode([rendered])[0][0]


def test_an_error_names_the_prompt_on_the_rank_that_has_it() -> None:
    model, tokenizer = llama(), chat_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('x') }}" + (
        "{% endif %}" + TEMPLATE
    )
    talks = [*TALKS, [{"role": "user", "content": "no"}]]

    def sample(rank: int) -> list[int]:
        wanted = range(len(talks))
        found = iter_responses(model, tokenizer, talks, wanted, shard=(rank, 3), **SETTINGS)
        return [index for index, _ in found]

    # Seven batches; the largest prompts come first, and "no" is in the fourth.
    sizes = sorted(range(len(talks)), key=lambda i: -len(talks[i][0]["content"]))
    rank = sizes.index(len(TALKS)) // 2 % 3
    with raises("template.refuses-row", DataError, where=f"prompt {len(TALKS)}"):
        sample(rank)
    done = [index for other in {0, 1, 2} - {rank} for index in sample(other)]
    assert len(TALKS) not in done and done
    with raises("template.refuses-row", DataError, where=f"prompt {len(TALKS)}"):
        sample_responses(model, tokenizer, talks, **SETTINGS)


def test_batches_hold_prompts_of_similar_length() -> None:
    """The size in bytes orders texts of one kind as their tokens do, tools included."""
    tools = [None, [{"type": "function", "function": {"name": "f" * 50}}], None]
    texts = ["a" * 10, "a" * 10, "漢" * 10]
    prompts = Prompts(texts, tools, None, None)
    sizes = [prompts.size(index) for index in range(3)]
    assert sizes[1] > sizes[0] + 50 and sizes[2] == sizes[0] + 20
    assert Prompts(["\ud800"], None, None, None).size(0) > 0
