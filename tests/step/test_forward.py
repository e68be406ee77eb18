"""The packed step compared with a plain, unpacked forward with full logits for each response."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rpo_trainer.errors import ModelError
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.step.forward import Head, install, token_logprobs, uninstall
from rpo_trainer.step.packing import pack
from tests.raising import raises
from tests.small_models import FAMILIES, VOCABULARY, make_model


def random_examples(seed: int, ks=(2, 1, 4), *, spans: bool = False, vocabulary=VOCABULARY):
    """Examples of various lengths and K; with `spans` the masks have untrained tokens, as in multi-turn
    SFT."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    examples = []
    for k in ks:
        responses = [tokens(2, 14) for _ in range(k)]
        masks = [
            [int(not spans or j % 3 != 1) for j in range(len(response))] for response in responses
        ]
        examples.append(
            {"prompt_ids": tokens(1, 12), "response_ids": responses, "response_mask": masks}
        )
    return examples


def plain_logprobs(model, examples):
    """A separate forward for each response, with all logits."""
    pieces = []
    for example in examples:
        for response, mask in zip(example["response_ids"], example["response_mask"], strict=True):
            ids = torch.tensor([example["prompt_ids"] + response])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            prompt = len(example["prompt_ids"])
            for j, trained in enumerate(mask):
                if trained:
                    pieces.append(logps[prompt + j - 1, response[j]])
    return torch.stack(pieces)


class Float64Inside(TorchFunctionMode):
    """Compute norms, softmaxes and rotary angles, which transformers pins to float32, in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **kwargs)


def compare(model, examples, layout, *, rtol, atol, **settings):
    """Compare log-probs, and the gradients of a weighted sum for all parameters, packed and plain."""
    exact = next(model.parameters()).dtype == torch.float64
    with Float64Inside() if exact else contextlib.nullcontext():
        _compare(model, examples, layout, rtol, atol, settings)


def _compare(model, examples, layout, rtol, atol, settings):
    expected = plain_logprobs(model, examples)
    weights = torch.linspace(-1, 1, len(expected), dtype=expected.dtype)
    model.zero_grad()
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    install(model, layout=layout, **settings)
    model.zero_grad()
    actual = token_logprobs(model, pack(examples, layout).model_inputs)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    (actual * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < rtol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_plain_forwards(family, layout):
    model = make_model(family, dtype=torch.float64)
    compare(model, random_examples(1), layout, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_plain_forwards(family, layout):
    compare(make_model(family), random_examples(2), layout, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_many_responses_and_spans_with_holes(seed):
    model = make_model("llama", dtype=torch.float64, seed=seed)
    compare(
        model, random_examples(seed, ks=(8, 3, 1, 5), spans=True), "shared", rtol=1e-7, atol=1e-7
    )


def test_tied_embeddings_and_small_tiles():
    model = make_model("llama", dtype=torch.float64, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    compare(
        model,
        random_examples(3),
        "shared",
        rtol=1e-7,
        atol=1e-7,
        head=Head(logits_chunk_bytes=8 * 50),
    )


def test_attention_sinks_equal_plain_forwards():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
        num_local_experts=2, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    compare(model, random_examples(4), "shared", rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    model = make_model("llama").train()
    model.gradient_checkpointing_enable()
    compare(model, random_examples(5), "shared", rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_takes_the_generic_path():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        make_model("llama", dtype=torch.float64),
        LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False),
    )
    model.eval()
    install(model)
    examples = random_examples(6)
    expected = plain_logprobs(model, examples)
    actual = token_logprobs(model, pack(examples, "shared").model_inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_own_logits_are_the_last_resort():
    model = make_model("llama", dtype=torch.float64)
    compare(model, random_examples(7), "shared", rtol=1e-7, atol=1e-7, head=Head(fused=False))


def test_responses_do_not_see_their_siblings():
    model = make_model("llama", dtype=torch.float64)
    install(model)
    example = random_examples(8, ks=(3,))[0]
    changed = {**example, "response_ids": [list(r) for r in example["response_ids"]]}
    changed["response_ids"][0][0] = (changed["response_ids"][0][0] + 1) % VOCABULARY
    first, second = (
        token_logprobs(model, pack([e], "shared").model_inputs) for e in (example, changed)
    )
    n = len(example["response_ids"][0])
    assert not torch.equal(first[:n], second[:n])
    assert torch.equal(first[n:], second[n:])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_installed_model_still_generates_and_answers_padded_calls(family):
    model = make_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, tokens = model(**call).logits, model.generate(**call, **settings)
    install(model)
    torch.testing.assert_close(model(**call).logits[mask == 1], expected[mask == 1])
    assert torch.equal(model.generate(**call, **settings), tokens)
    uninstall(model)
    assert "forward" not in vars(model) or model.forward.__name__ == "forward"
    assert torch.equal(model(**call).logits, expected)
    assert model.config._attn_implementation != "rpo_packed"


def test_saved_config_does_not_name_the_attention(tmp_path):
    model = make_model("llama")
    install(model)
    model.save_pretrained(tmp_path)
    assert "rpo_packed" not in (tmp_path / "config.json").read_text()


def test_a_model_not_from_transformers_is_refused():
    with raises("model.not-transformers", ModelError) as error:
        transformers_model(torch.nn.Linear(2, 2))
    assert "Linear" in error.value.what


def test_pretrained_model_meets_its_golden_log_probs(shared_dir):
    from transformers import AutoModelForCausalLM

    folder = shared_dir / "data" / "fixtures" / "models" / "stories260K"
    golden = json.loads((folder / "golden.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    install(model)
    cases = [case for case in golden["cases"] if len(case["ids"]) > 1]
    examples = [
        {
            "prompt_ids": case["ids"][:1],
            "response_ids": [case["ids"][1:]],
            "response_mask": [[1] * (len(case["ids"]) - 1)],
        }
        for case in cases
    ]
    logps = token_logprobs(model, pack(examples, "shared").model_inputs)
    expected = torch.tensor([x for case in cases for x in case["logprobs"]], dtype=torch.float64)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=2e-6)


def test_pretrained_model_packed_equals_plain(shared_dir):
    from transformers import AutoModelForCausalLM

    folder = shared_dir / "data" / "fixtures" / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    compare(model, random_examples(9, vocabulary=512), "shared", rtol=1e-7, atol=1e-7)


def test_a_copy_of_an_installed_model_runs_its_own_weights():
    model = make_model()
    install(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    inputs = pack(
        [{"prompt_ids": [3, 4], "response_ids": [[5, 6], [7]], "response_mask": [[1, 1], [1]]}],
        "shared",
    ).model_inputs
    fresh = make_model()
    fresh.load_state_dict(other.state_dict())
    install(fresh)
    torch.testing.assert_close(token_logprobs(other, inputs), token_logprobs(fresh, inputs))
    assert not torch.allclose(token_logprobs(other, inputs), token_logprobs(model, inputs))
    plain = torch.tensor([[3, 4]])
    torch.testing.assert_close(other(plain).logits, fresh(plain).logits)
