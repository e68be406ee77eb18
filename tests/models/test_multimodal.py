"""Checkpoints with towers, trained on text: their class, frozen and saved weights, and outputs."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Emu3ForCausalLM,
    ProcessorMixin,
)

from rpo_trainer import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError
from rpo_trainer.models.from_config import auto_class
from rpo_trainer.models.loading import (
    load_model_named,
    load_tokenizer_named,
    load_weights,
)
from rpo_trainer.models.multimodal import random_model, text_decoder, tower_parameters
from rpo_trainer.models.preload_checks import check_towers, check_unread
from rpo_trainer.models.saved_files import write_auto_class_files
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.packing import pack
from rpo_trainer.trainers.engine import may_be_unused
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.setup import tokenizer_in
from tests.raising import raises

VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14}


def _mrope(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], **more}
    return {**TEXT, "head_dim": 8, "rope_parameters": rope}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": kind, **more}


CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": _mrope(), "vision_config": {**_QWEN, "embed_dim": 32}},
    "qwen2_5_vl": {
        "text_config": _mrope(),
        "vision_config": {
            **_QWEN, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": _mrope(),
        "vision_config": {
            **_QWEN, "intermediate_size": 48, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    },
    "glm4v": {
        "text_config": _mrope(partial_rotary_factor=1.0),
        "vision_config": {
            **_QWEN, "intermediate_size": 48, "out_hidden_size": 32, "image_size": 28,
        },
    },
    "mistral3": {
        "text_config": _text("mistral", head_dim=8),
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4,
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llava": {"text_config": _text("llama"), "vision_config": CLIP},
    "llava_next": {"text_config": _text("llama"), "vision_config": CLIP},
    "idefics3": {"text_config": _text("llama"), "vision_config": {**VISION}, "scale_factor": 2},
    "smolvlm": {"text_config": _text("llama"), "vision_config": {**VISION}, "scale_factor": 2},
    "aria": {
        "text_config": _text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        "vision_config": {**VISION, "model_type": "idefics3_vision"},
        "projector_patch_to_query_dict": {"4": 4},
    },
    "mllama": {
        "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 96,
            "intermediate_layers_indices": [0, 1],
        },
    },
    "llama4": {
        "text_config": {
            **TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
            "attention_chunk_size": 64,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "qwen2_audio": {
        "text_config": _text("qwen2"),
        "audio_config": {
            "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "d_model": 32, "max_source_positions": 64,
        },
    },
}  # fmt: skip


def make_checkpoint(name: str, folder: Path) -> Any:
    """A random model of a shape, with random biases and norms, saved with its processor's file."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SHAPES[name])
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"of": name}))
    return model.eval()


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(6, 100, (n,), generator=generator).tolist()

    return [
        {
            "id": str(number), "source": "test", "prompt_ids": tokens(prompt),
            "response_ids": [tokens(n) for n in lengths],
            "response_mask": [[1] * n for n in lengths],
        }
        for number, (prompt, lengths) in enumerate([(5, (4, 2)), (9, (1, 6)), (3, (7, 3)), (7, (2, 5))])
    ]  # fmt: skip


@torch.no_grad()
def plain_logprobs(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """By the class's own forward, one response at a time."""
    pieces = []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            logits = model(input_ids=ids, use_cache=False).logits[
                0, len(row["prompt_ids"]) - 1 : -1
            ]
            pieces.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(pieces)


def trainer(kind: Any, model: Any, folder: Path, rows: Any, **more: Any) -> Any:
    config: Any = RewardConfig if kind is RewardTrainer else DPOConfig
    arguments = config(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, weight_decay=0.1,
        gradient_checkpointing=False, **more.pop("arguments", {}),
    )  # fmt: skip
    return kind(
        model, args=arguments, train_dataset=rows, processing_class=character_tokenizer(), **more
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_of_dpo(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_checkpoint(name, tmp_path / "model")
    try:
        plain_logprobs(made, examples())
    except AttributeError:  # Llama-4 in transformers 5.24
        with pytest.raises(ModelError):
            load_model_named(str(tmp_path / "model"))
        return
    model: Any = load_model_named(str(tmp_path / "model"))
    assert type(model) is type(made)
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        dpo = trainer(DPOTrainer, model, tmp_path / "run", Examples(examples()))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == tower_parameters(model).keys()
    assert f"{sum(p.numel() for p in frozen.values()):,} of " in caplog.text
    assert not may_be_unused(model) or name == "aria"  # a list of experts may be unused
    # No weights are frozen except those that text does not use.
    gradients: dict[str, float] = {}

    def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients.update({n: 1.0 for n, p in model.named_parameters() if p.grad is not None})

    dpo.callback_handler.callbacks[0].on_pre_optimizer_step = note
    dpo.train()
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}

    dpo.save_model(str(tmp_path / "out"))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("model", "out"))
    assert before.keys() == after.keys()
    again, info = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert type(again) is type(made)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    there = dict(again.named_parameters())
    assert all(torch.equal(there[n], p) for n, p in frozen.items())
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == json.dumps({"of": name})
    # The packed step of the trained model, and the plain forward of the saved one.
    rows, model = examples(), model.eval()
    expected = plain_logprobs(again.eval(), rows)
    with torch.no_grad():
        packed = token_logprobs(model, pack(rows, dpo.layout, pad_token_id=0).model_inputs)
    assert (packed - expected).abs().max() < 2e-6
    assert (plain_logprobs(made, rows) - expected).abs().max() > 1e-3  # the model has changed


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mllama"])
def test_adapters_are_put_into_the_language_model_alone(name: str, tmp_path: Path) -> None:
    make_checkpoint(name, tmp_path / "model")
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["down_proj"])
    dpo = trainer(
        DPOTrainer, str(tmp_path / "model"), tmp_path / "run", Examples(examples()), peft_config=config
    )  # fmt: skip
    adapted = {n for n, p in dpo.model.named_parameters() if p.requires_grad}
    towers = tower_parameters(dpo.model.get_base_model())
    assert adapted and not adapted & {f"base_model.model.{n}" for n in towers}
    assert not any("down_proj" in n for n in adapted)
    dpo.train()
    dpo.save_model(str(tmp_path / "adapter"))
    base = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    rows = examples()
    with torch.no_grad():
        dpo.model.eval()
        packed = token_logprobs(dpo.model, pack(rows, dpo.layout, pad_token_id=0).model_inputs)
    assert (plain_logprobs(loaded, rows) - packed).abs().max() < 2e-6


def test_a_composite_classifier_and_one_of_the_text_part(tmp_path: Path) -> None:
    """Gemma-3 has a classifier with its towers; Mistral-3 only has one for the text decoder."""
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f"},
    ] * 2
    for name, kind in (
        ("gemma3", "Gemma3ForSequenceClassification"),
        ("mistral3", "MistralForSequenceClassification"),
    ):
        make_checkpoint(name, tmp_path / name)
        reward = trainer(RewardTrainer, str(tmp_path / name), tmp_path / "run", rows)
        assert type(reward.model).__name__ == kind
        assert all(not p.requires_grad for p in tower_parameters(reward.model).values())
        reward.train()
        reward.save_model(str(tmp_path / f"{name}-reward"))
        assert type(load_weights(tmp_path / f"{name}-reward", reward=True)).__name__ == kind
    make_checkpoint("qwen2_5_vl", tmp_path / "qwen")
    with raises("model.no-sequence-classifier", ModelError):
        trainer(RewardTrainer, str(tmp_path / "qwen"), tmp_path / "run", rows)
    with raises(
        "adapter.text-part", ModelError
    ):  # no base that a PEFT adapter of it could be loaded onto
        trainer(
            RewardTrainer, str(tmp_path / "mistral3"), tmp_path / "run", rows,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip


# --- the processor ---


def test_a_processor_stands_for_its_tokenizer() -> None:
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer: Any, chat_template: str) -> None:
            self.tokenizer, self.chat_template = tokenizer, chat_template

    tokenizer = character_tokenizer()
    assert tokenizer_in(tokenizer) is tokenizer and tokenizer_in(None) is None
    tokenizer.chat_template = None
    assert tokenizer_in(Processor(tokenizer, "{{ messages }}")) is tokenizer
    assert tokenizer.chat_template == "{{ messages }}"


def test_the_template_of_a_processor_alone(tmp_path: Path) -> None:
    """Old processors have their template in a file that tokenizers do not read, and prefer it."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    make_checkpoint("llava", tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    dpo = DPOTrainer(str(tmp_path / "model"), DPOConfig(
        output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True, bf16=False, max_steps=1
    ), train_dataset=rows)  # fmt: skip
    assert dpo.processing_class.chat_template == template
    dpo.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert load_tokenizer_named(str(tmp_path / "out")).chat_template == template


# --- which class ---


def test_architectures_choose_the_class(tmp_path: Path) -> None:
    config: Any = CONFIG_MAPPING["llama4"](**SHAPES["llama4"])
    assert auto_class(config, reward=False, where="") is AutoModelForMultimodalLM
    config.architectures = ["Llama4ForCausalLM"]
    with torch.device("meta"):
        made = random_model(auto_class(config, reward=False, where=""), config)
    assert type(made).__name__ == "Llama4ForCausalLM"


def test_a_text_config_that_no_auto_class_knows(tmp_path: Path) -> None:
    text: Any = CONFIG_MAPPING["emu3_text_model"](**TEXT)
    Emu3ForCausalLM(text).save_pretrained(tmp_path)
    check_unread(AutoConfig.from_pretrained(tmp_path), tmp_path, tokens=9, reward=False, where="")
    model = load_weights(tmp_path)
    assert type(model) is Emu3ForCausalLM
    assert isinstance(text_decoder(model), nn.Module)
    # An Auto class also reads the output: it has the composite configuration, which contains this part.
    model.save_pretrained(tmp_path / "out")
    write_auto_class_files(model, tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is Emu3ForCausalLM and not any(info.values())
    assert again.config.to_diff_dict()["vocab_size"] == model.config.vocab_size
    assert type(load_weights(tmp_path / "out")) is Emu3ForCausalLM


@pytest.mark.parametrize(
    ("kind", "code", "word"),
    [
        ("blip-2", "not-text-only", "pixel_values"),
        ("pix2struct", "not-text-only", "encoder-decoder"),
        ("qwen2_5_omni", "not-text-only", "no forward"),
        ("paligemma", "not-text-only", "bidirectional"),
        ("clip", "no-language-model", "AutoModelForMultimodalLM"),
    ],
)
def test_refused_with_the_reason(kind: str, code: str, word: str) -> None:
    with raises(f"model.{code}", ModelError, where="here") as error:
        auto_class(CONFIG_MAPPING[kind](), reward=False, where="here")
    assert word in f"{error.value.what} {error.value.why}"


def test_a_forward_that_asks_for_an_image() -> None:
    config = CONFIG_MAPPING["idefics"](
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, vision_config={"embed_dim": 32, "num_hidden_layers": 1,
        "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28},
    )  # fmt: skip
    with raises("model.not-text-only", ModelError, where="here") as error:
        check_towers(config, reward=False, where="here")
    assert re.search("pixel_values", str(error.value.why))


def test_check_counts_what_is_frozen(tmp_path: Path) -> None:
    model = make_checkpoint("llava_next", tmp_path)
    line = check_towers(AutoConfig.from_pretrained(tmp_path), reward=False, where="here")
    frozen = sum(p.numel() for p in tower_parameters(model).values())
    assert line is not None and f"{frozen:,} of " in line and "model.image_newline" in line
    llama = CONFIG_MAPPING["llama"](**TEXT)
    assert check_towers(llama, reward=False, where="here") is None
