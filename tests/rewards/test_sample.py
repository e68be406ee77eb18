"""Sampling: responses are returned in order, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import DataError, ModelError, RecipeError
from rpo_trainer.rewards.sample import (
    Sample,
    greedy_responses,
    iter_responses,
    sample_responses,
)
from tests.raising import raises
from tests.rewards.policies import PROMPTS, TEMPLATE, llama, next_token_model, plain_greedy


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_in_padded_batches_is_greedy_one_by_one(batch_size: int) -> None:
    model = llama()
    found = greedy_responses(
        model, character_tokenizer(), PROMPTS, max_new_tokens=7, batch_size=batch_size
    )
    assert found == [plain_greedy(model, prompt, 7) for prompt in PROMPTS]


def test_every_prompt_gets_its_k_responses_in_order() -> None:
    # Each letter is followed by its own capital, then the end.
    letters = "abcdefgh"
    table = {letter: {letter.upper(): 1.0} for letter in letters}
    table |= {letter.upper(): {"</s>": 1.0} for letter in letters}
    prompts = ["x" * ((i * 5) % 7) + letters[i % 8] for i in range(21)]
    found = sample_responses(
        next_token_model(table),
        character_tokenizer(),
        prompts,
        responses=3,
        max_new_tokens=5,
        batch_size=8,
    )
    assert found == [[Sample(prompt[-1].upper(), True)] * 3 for prompt in prompts]


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    model = next_token_model({"q": {"a": 0.6, "b": 0.3, "c": 0.1}} | _then_end("abc"))
    share = _shares(model, responses=4000)
    assert share["a"] == pytest.approx(0.6, abs=0.03)
    assert share["b"] == pytest.approx(0.3, abs=0.03)
    assert share["c"] == pytest.approx(0.1, abs=0.02)


def test_temperature_top_p_and_top_k_shape_them() -> None:
    model = next_token_model({"q": {"a": 0.6, "b": 0.3, "c": 0.1}} | _then_end("abc"))
    cold = _shares(model, responses=2000, temperature=0.5)  # squares: 36 : 9 : 1
    assert cold["a"] == pytest.approx(36 / 46, abs=0.03)
    assert set(_shares(model, responses=500, top_k=1)) == {"a"}
    assert set(_shares(model, responses=500, top_k=2)) == {"a", "b"}
    assert set(_shares(model, responses=500, top_p=0.8)) == {"a", "b"}


def _then_end(letters: str) -> dict[str, dict[str, float]]:
    return {letter: {"</s>": 1.0} for letter in letters}


def _shares(model: LlamaForCausalLM, *, responses: int, **sampling: Any) -> dict[str, float]:
    (found,) = sample_responses(
        model,
        character_tokenizer(),
        ["q"],
        responses=responses,
        max_new_tokens=3,
        batch_size=responses,
        seed=5,
        **sampling,
    )
    counts = Counter(sample.text for sample in found)
    return {text: count / responses for text, count in counts.items()}


def test_a_response_without_an_end_token_is_unfinished() -> None:
    model = next_token_model({"q": {"a": 1.0}, "a": {"b": 1.0}, "b": {"</s>": 1.0}})
    tokenizer = character_tokenizer()
    cut = greedy_responses(model, tokenizer, ["q"], max_new_tokens=2)
    assert cut == [Sample("ab", False)]
    whole = greedy_responses(model, tokenizer, ["q"], max_new_tokens=3)
    assert whole == [Sample("ab", True)]


def test_control_tokens_are_stripped_and_control_text_in_a_prompt_is_text() -> None:
    # `>` ends the prompt below only if `<s>` was read as three characters.
    model = next_token_model({">": {"<unk>": 1.0}, "<unk>": {"k": 1.0}} | _then_end("k"))
    found = greedy_responses(model, character_tokenizer(), ["say <s>"], max_new_tokens=4)
    assert found == [Sample("k", True)]


def test_the_seed_decides_and_not_the_global_state() -> None:
    model, tokenizer = llama(), character_tokenizer()

    def draw(global_seed: int, seed: int) -> list[list[Sample]]:
        torch.manual_seed(global_seed)
        return sample_responses(
            model, tokenizer, PROMPTS, responses=3, max_new_tokens=8, batch_size=6, seed=seed
        )

    first = draw(global_seed=0, seed=1)
    assert draw(global_seed=9, seed=1) == first
    assert draw(global_seed=0, seed=2) != first
    assert len({sample.text for sample in first[0]}) > 1


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_what_else_is_in_the_batch_does_not_matter(batch_size: int) -> None:
    model, tokenizer = llama(), character_tokenizer()
    settings = {"responses": 2, "max_new_tokens": 8, "seed": 5, "temperature": 0.8, "top_k": 20}
    keys = [f"row-{i}" for i in range(len(PROMPTS))]
    whole = sample_responses(model, tokenizer, PROMPTS, keys=keys, **settings)
    assert whole == sample_responses(
        model, tokenizer, PROMPTS, keys=keys, batch_size=batch_size, **settings
    )
    turned = sample_responses(model, tokenizer, PROMPTS[::-1], keys=keys[::-1], **settings)
    assert turned[::-1] == whole
    (alone,) = sample_responses(model, tokenizer, [PROMPTS[3]], keys=[keys[3]], **settings)
    assert alone == whole[3]


def test_a_prompts_key_decides_and_only_wanted_prompts_are_sampled() -> None:
    model, tokenizer = llama(), character_tokenizer()
    settings = {"responses": 2, "max_new_tokens": 8}
    first, second, again = sample_responses(
        model, tokenizer, ["ab", "ab", "ab"], keys=["x", "y", "x"], **settings
    )
    assert first == again and first != second
    found = dict(
        iter_responses(model, tokenizer, ["ab"] * 3, {1}, keys=["x", "y", "x"], **settings)
    )
    assert found == {1: second}


def test_global_state_mode_and_configs_are_left_as_they_were() -> None:
    model, tokenizer = llama(), character_tokenizer()
    model.train()
    model.model.layers[0].eval()  # a mixture of modes, as with frozen parts
    model.config.use_cache = False
    model.generation_config.max_new_tokens = 3
    modes = [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    kept, padding_side = model.generation_config, tokenizer.padding_side
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sample_responses(model, tokenizer, PROMPTS, responses=2, max_new_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert model.generation_config is kept
    assert tokenizer.padding_side == padding_side


def test_they_are_put_back_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    kept = model.generation_config

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_responses(model, character_tokenizer(), ["a"], responses=1, max_new_tokens=2)
    assert model.training
    assert model.generation_config is kept


def test_weights_can_be_trained_after_sampling() -> None:
    model, tokenizer = llama(), character_tokenizer()
    sample_responses(model, tokenizer, PROMPTS, responses=1, max_new_tokens=2)
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_what_a_checkpoint_says_about_decoding_is_set_aside() -> None:
    plain, opinionated = llama(), llama()
    for name, value in {
        "repetition_penalty": 3.0,
        "top_k": 1,
        "temperature": 0.01,
        "suppress_tokens": [70, 71],
        "min_new_tokens": 6,
        "num_beams": 2,
    }.items():
        setattr(opinionated.generation_config, name, value)
    tokenizer = character_tokenizer()
    sampled, greedy = {"responses": 4, "max_new_tokens": 8}, {"max_new_tokens": 8}
    assert sample_responses(opinionated, tokenizer, PROMPTS, **sampled) == sample_responses(
        plain, tokenizer, PROMPTS, **sampled
    )
    assert greedy_responses(opinionated, tokenizer, PROMPTS, **greedy) == greedy_responses(
        plain, tokenizer, PROMPTS, **greedy
    )


def test_further_end_tokens_of_the_checkpoint_end_a_response() -> None:
    model = next_token_model({"q": {"a": 1.0}, "a": {"!": 1.0}, "!": {"b": 1.0}})
    tokenizer = character_tokenizer()
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("!")]
    assert greedy_responses(model, tokenizer, ["q"], max_new_tokens=5) == [Sample("a", True)]


def test_a_tokenizer_without_pad_token_works() -> None:
    model = llama()
    expected = greedy_responses(model, character_tokenizer(), PROMPTS, max_new_tokens=6)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    assert greedy_responses(model, tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert tokenizer.pad_token is None


def test_messages_go_through_the_template_with_one_begin_token() -> None:
    model, tokenizer = llama(), character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    assert greedy_responses(model, tokenizer, [messages], max_new_tokens=6) == [
        plain_greedy(model, "u:hello\na:", 6)
    ]


def test_a_checkpoint_that_learned_absolute_positions_is_padded_rightly() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).eval()
    found = greedy_responses(model, character_tokenizer(), PROMPTS, max_new_tokens=6)
    assert found == [plain_greedy(model, prompt, 6) for prompt in PROMPTS]


def test_an_adapter_is_sampled_and_left_as_it_was() -> None:
    from peft import LoraConfig, get_peft_model

    base = llama()
    expected = greedy_responses(base, character_tokenizer(), PROMPTS, max_new_tokens=6)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], r=2))
    configs = model.generation_config, model.get_base_model().generation_config
    assert greedy_responses(model, character_tokenizer(), PROMPTS, max_new_tokens=6) == expected
    assert model.generation_config is configs[0]
    assert model.get_base_model().generation_config is configs[1]


def test_no_prompts_give_no_responses() -> None:
    assert sample_responses(llama(), character_tokenizer(), [], responses=2, max_new_tokens=2) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"responses": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 64},  # beyond the context
        {"batch_size": 0, "responses": 1},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    arguments = {"responses": 2, "max_new_tokens": 4, **wrong}
    beyond = wrong.get("max_new_tokens") == 64
    code = "model.context-exceeded" if beyond else "recipe.out-of-range"
    with raises(code, RecipeError, where="generate"):
        sample_responses(llama(), character_tokenizer(), ["abc"], **arguments)


def test_unusable_tokenizers_and_prompts_are_refused() -> None:
    model, tokenizer = llama(), character_tokenizer()
    with raises("template.missing", DataError, where="model.chat_template"):
        greedy_responses(model, tokenizer, [[{"role": "user", "content": "a"}]], max_new_tokens=2)
    tokenizer.eos_token = None
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    with raises("tokenizer.no-end-token", ModelError):
        greedy_responses(model, tokenizer, ["a"], max_new_tokens=2)
    model.generation_config.eos_token_id = kept
    refusing = character_tokenizer()
    refusing.chat_template = "{{ raise_exception('no systems') }}"
    with raises("template.refuses-row", DataError, where="prompt 0") as error:
        greedy_responses(model, refusing, [[{"role": "user", "content": "a"}]], max_new_tokens=2)
    assert "no systems" in error.value.what
    # The template does not affect texts.
    assert greedy_responses(model, refusing, ["ab"], max_new_tokens=2)
    beginless = character_tokenizer()
    beginless.bos_token = None
    beginless._tokenizer.post_processor = None
    with raises("data.empty-prompt", DataError, where="prompt 0"):
        greedy_responses(model, beginless, [""], max_new_tokens=2)


def test_a_pretrained_model_tells_its_golden_story(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "fixtures" / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    story = json.loads((folder / "golden.json").read_text())["greedy_text"]
    begin = "Once upon a time,"
    (found, _) = greedy_responses(
        model, tokenizer, [begin, "Lily and her mom went to the big"], max_new_tokens=60
    )
    assert found.text.startswith(" there was a little girl")  # with its leading space
    assert story.startswith(begin + found.text)
    assert len(found.text) > 100
    assert not found.finished
