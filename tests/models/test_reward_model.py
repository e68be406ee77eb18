"""Reward models: the packed scores equal those of other tools that load the saved directory."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.models.reward_model import (
    as_reward_model,
    attributes_of,
    weights_of,
    with_pad_token,
)
from rpo_trainer.models.unwrap import is_classifier
from rpo_trainer.step import attention, layout_probe
from rpo_trainer.step.forward import install, response_scores, uninstall
from rpo_trainer.step.layout_probe import probe
from rpo_trainer.step.packing import pack
from tests.raising import raises
from tests.small_models import FAMILIES, make_model
from tests.step.test_forward import Float64Inside, random_examples
from tests.step.test_layout_probe import Blind

CLASSIFIED = [family for family in FAMILIES if family not in ("cohere", "granite")]
NAMES = ("helpfulness", "verbosity", "depth")


def make_reward_model(family="llama", *, dtype=torch.float32, names=NAMES, **settings):
    model = as_reward_model(make_model(family, dtype=dtype), attributes=names, **settings)
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.score.weight.mul_(20)  # scores of a new head are too small to show faults
    return model


def plain_scores(model, examples, padding="right"):
    """One stock forward of padded rows, as in other tools."""
    rows = [e["prompt_ids"] + r for e in examples for r in e["response_ids"]]
    width = max(map(len, rows))

    def padded(row, fill):
        rest = [fill] * (width - len(row))
        return row + rest if padding == "right" else rest + row

    return model(
        input_ids=torch.tensor([padded(row, 0) for row in rows]),
        attention_mask=torch.tensor([padded([1] * len(row), 0) for row in rows]),
    ).logits


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("family", CLASSIFIED)
def test_float64_scores_and_gradients_equal_a_plain_padded_forward(family, layout):
    model = make_reward_model(family, dtype=torch.float64)
    examples = random_examples(1)
    with Float64Inside():
        expected = plain_scores(model, examples)
        slopes = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        (expected * slopes).sum().backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        install(model, layout=layout)
        model.zero_grad()
        actual = response_scores(model, pack(examples, layout).model_inputs)
        assert actual.shape == (7, 3)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        (actual * slopes).sum().backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            off = (parameter.grad - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-9)
            assert off < 1e-7, f"{name}: relative error {off:.1e}"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_saved_directory_gives_any_tool_the_same_scores(family, tmp_path):
    model = make_reward_model(family, weights={"helpfulness": 1.0, "verbosity": -0.5, "depth": 0})
    tokenizer = with_pad_token(character_tokenizer(), model)
    install(model)
    examples = random_examples(2)
    with torch.no_grad():
        ours = response_scores(model, pack(examples, "shared").model_inputs)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **eager)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    with torch.no_grad():
        for padding in ("right",) if family == "gpt2" else ("right", "left"):
            torch.testing.assert_close(
                plain_scores(loaded, examples, padding), ours, rtol=1e-4, atol=1e-4
            )
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert loaded.config.reward_weights == {"helpfulness": 1.0, "verbosity": -0.5, "depth": 0.0}
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == loaded.config.pad_token_id


def test_the_decoder_is_the_language_models_and_the_head_is_drawn_by_the_seed():
    policy = make_model("llama", tie_word_embeddings=True)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    model = as_reward_model(policy, seed=3)
    assert is_classifier(model) and attributes_of(model) == ("reward",)
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    assert 0.01 < model.score.weight.std() < 0.04  # initializer_range is 0.02
    same, other = (as_reward_model(make_model("llama"), seed=seed) for seed in (3, 4))
    assert torch.equal(model.score.weight, same.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)


def test_a_reward_model_stays_what_it_is():
    model = make_reward_model(weights={"helpfulness": 2.0, "verbosity": 1.0, "depth": 0.0})
    head = model.score.weight.clone()
    assert as_reward_model(model) is model
    assert torch.equal(model.score.weight, head)
    assert attributes_of(model) == NAMES
    assert weights_of(model).tolist() == [2.0, 1.0, 0.0]
    as_reward_model(model, weights={"helpfulness": 0.0, "verbosity": 1.0, "depth": 0.0})
    assert weights_of(model).tolist() == [0.0, 1.0, 0.0]


def test_heads_without_names_are_given_some():
    model = make_reward_model(names=("LABEL_0", "LABEL_1"))
    assert attributes_of(as_reward_model(model, attributes=["a", "b"])) == ("a", "b")


def test_other_attributes_than_the_models_are_refused():
    with raises("model.attribute-mismatch", ModelError, where="attributes") as error:
        as_reward_model(make_reward_model(), attributes=["a", "b", "c"])
    assert "helpfulness, verbosity, depth" in error.value.what and "a, b, c" in error.value.what


def test_a_family_without_a_classifier_says_so():
    with raises("model.no-sequence-classifier", ModelError) as error:
        as_reward_model(make_model("granite"))
    assert "granite" in error.value.what


def test_a_classifier_with_another_head_says_so():
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=61, intermediate_size=48, is_decoder=True, **sizes)
    with raises("model.no-sequence-classifier", ModelError) as error:
        as_reward_model(BertLMHeadModel(config))
    assert "bert" in error.value.what and "classifier" in str(error.value.why)


def test_a_wrapped_language_model_is_refused():
    with raises("model.wrapped-language-model", ModelError) as error:
        as_reward_model(Module(make_model("llama")))
    assert "Module" in error.value.what


class Module(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_weights_are_checked_against_the_heads():
    with pytest.raises(RecipeError, match="verbosity"):
        as_reward_model(make_model("llama"), attributes=NAMES, weights={"helpfulness": 1.0})


# ---------------------------------------------------------------- the pad token


def test_the_pad_token_of_the_tokenizer_is_kept_where_it_ends_nothing():
    tokenizer, model = character_tokenizer(), make_reward_model()
    assert with_pad_token(tokenizer, model) is tokenizer
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_an_end_token_as_pad_token_is_replaced_in_a_copy(pad):
    tokenizer, model = character_tokenizer(), make_reward_model()
    tokenizer.pad_token = pad
    copy = with_pad_token(tokenizer, model)
    assert (copy.pad_token, tokenizer.pad_token) == ("<unk>", pad)
    assert model.config.pad_token_id == copy.pad_token_id


def test_a_tokenizer_with_nothing_to_pad_with_says_so():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.bos_token = None
    with raises("tokenizer.no-pad-token", ModelError):
        with_pad_token(tokenizer, make_reward_model())


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CLASSIFIED)
def test_the_probe_shares_prompts_for_known_families(family, dtype):
    layout, head = probe(make_reward_model(family, dtype=dtype))
    assert layout == "shared" and head.fused


def test_the_probe_sees_a_fresh_head_whose_scores_are_small(monkeypatch, caplog):
    """Like a stock attention: only position ids, so that sibling responses are visible."""

    functions = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(functions, attention.ATTENTION_NAME, Blind())
    model = as_reward_model(make_model("llama"))
    model.config.pad_token_id = 0
    layout, _ = probe(model)
    assert layout == "padded" and layout_probe._DEPENDS in caplog.text


def test_a_head_that_only_the_model_knows_is_left_to_its_own_forward(caplog):
    model = make_reward_model()
    model.score = torch.nn.Sequential(model.score)
    stock = model.forward

    def doubled(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    examples = random_examples(3)
    expected = plain_scores(model, examples)
    layout, head = probe(model)
    assert (layout, head.fused) == ("padded", False)
    assert "own forward" in caplog.text
    actual = response_scores(model, pack(examples, "padded").model_inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_probes_tokens_end_no_row_with_the_pad_token():
    """Otherwise the plain forward would read its scores one token before the packed one."""
    for pad in range(61):
        model = make_reward_model()
        model.config.pad_token_id = pad
        assert probe(model)[0] == "shared", f"pad token {pad}"


def test_a_reward_model_is_a_plain_classifier_again_after_uninstall():
    model = make_reward_model()
    examples = random_examples(1)
    expected = plain_scores(model, examples)
    install(model)
    uninstall(model)
    torch.testing.assert_close(plain_scores(model, examples), expected)
    assert model.config._attn_implementation != attention.ATTENTION_NAME


def test_scores_are_exact_under_autocast():
    model = make_reward_model()
    install(model)
    inputs = pack(random_examples(1), "shared").model_inputs
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        hidden = []
        model.score.register_forward_hook(lambda m, args, out: hidden.append((args[0], out)))
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        scores = response_scores(model, inputs)
    ((last, out),) = hidden
    assert scores.dtype == last.dtype == out.dtype == torch.float32
    torch.testing.assert_close(scores, last @ model.score.weight.T)
