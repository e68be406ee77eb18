"""Examples that do not fit the model, and losses that it requires, are detected before training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rpo_trainer import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.fits import check_fit
from tests.raising import raises
from tests.small_models import VOCABULARY, make_model


def row(prompt: int = 4, responses: tuple[int, ...] = (4,), token: int = 5) -> dict[str, Any]:
    return {
        "prompt_ids": [5] * prompt,
        "response_ids": [[token] * n for n in responses],
        "response_mask": [[1] * n for n in responses],
    }


def args(cls: Any, folder: Path, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return cls(**{**settings, **changes})


def sft(model: Any, folder: Path, train: Any, **more: Any) -> SFTTrainer:
    return SFTTrainer(
        model, args=args(SFTConfig, folder), train_dataset=train,
        processing_class=character_tokenizer(), **more,
    )  # fmt: skip


GOOD = [row(), row()]
OUTSIDE = {
    "a token behind the table": row(token=VOCABULARY),
    "a negative token": row(token=-1),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_tokens_outside_of_the_table(case: str, tmp_path: Path) -> None:
    bad = [*GOOD, OUTSIDE[case]]
    token = OUTSIDE[case]["response_ids"][0][0]
    for train, more, name in (
        (bad, {}, "train"),
        (GOOD, {"eval_dataset": bad}, "eval"),
        (GOOD, {"eval_dataset": {"far": bad}}, "eval_far"),
    ):
        found = {"data": name, "token": token, "embeddings": VOCABULARY}
        with raises("model.missing-embeddings", ModelError, **found) as error:
            sft(make_model(), tmp_path, train, **more)
        assert error.value.fix
    trainer = sft(make_model(), tmp_path, GOOD)
    with raises("model.missing-embeddings", ModelError, data="eval", token=token):
        trainer.evaluate(bad)


def test_texts_whose_tokens_the_model_does_not_have(tmp_path: Path) -> None:
    with raises("model.missing-embeddings", ModelError, data="train"):
        sft(make_model(), tmp_path, [{"prompt": "a", "completion": "z~"}])


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_rows_longer_than_a_table_of_positions(layout: str, tmp_path: Path) -> None:
    """Packed responses of a prompt restart after it: the longest counts, not their sum."""
    model = make_model("gpt2", n_positions=48)
    options = {"processing_class": character_tokenizer()}
    config = args(DPOConfig, tmp_path, layout=layout)
    fits = [row(16, (32, 31))] * 2  # 79 tokens in sequence
    DPOTrainer(model, args=config, train_dataset=fits, **options).train()
    found = {"model": "the model", "tokens": 49, "positions": 48}
    with raises("model.missing-positions", ModelError, **found) as error:
        DPOTrainer(model, args=config, train_dataset=[row(16, (4, 33))] * 2, **options)
    assert "48" in str(error.value.fix)


def test_a_reference_with_fewer_positions(tmp_path: Path) -> None:
    with raises("model.missing-positions", ModelError, model="the reference", positions=32):
        DPOTrainer(
            make_model("gpt2", n_positions=64), ref_model=make_model("gpt2", n_positions=32),
            args=args(DPOConfig, tmp_path), train_dataset=[row(16, (20, 24))] * 2,
            processing_class=character_tokenizer(),
        )  # fmt: skip
    with raises("tokenizer.mismatch", RecipeError):
        DPOTrainer(
            make_model(), ref_model=make_model(vocab_size=40), args=args(DPOConfig, tmp_path),
            train_dataset=[row(4, (4, 5))] * 2, processing_class=character_tokenizer(),
        )  # fmt: skip


def test_a_reward_model_has_the_same_checks(tmp_path: Path) -> None:
    with raises("model.missing-embeddings", ModelError, token=99):
        RewardTrainer(
            make_model(), args=args(RewardConfig, tmp_path),
            train_dataset=[row(4, (4, 5), token=99)] * 2, processing_class=character_tokenizer(),
        )  # fmt: skip


def test_rotary_positions_can_be_computed_beyond(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        sft(make_model(max_position_embeddings=32), tmp_path, [row(16, (20,))] * 2).train()
    assert "36 tokens" in caplog.text and "32 positions" in caplog.text


TINY = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BODY = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
# How a model represents positions: its limit, if any.
POSITIONS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "learned": ("gpt_neo", {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
    }, True),
    "learned, with an offset": ("opt", {
        "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16,
    }, True),
    "computed once": ("gptj", {
        "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4,
    }, True),
    "computed as needed": ("xglm", {
        "d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 32,
    }, False),
    "none": ("granitemoehybrid", {
        **BODY, "num_key_value_heads": 2, "layer_types": ["attention", "attention"],
        "position_embedding_type": None, "num_local_experts": 0, "shared_intermediate_size": 16,
        "mamba_n_heads": 2,
    }, False),
    "recurrent": ("rwkv", {
        "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 32,
    }, False),
    "no limit": ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", POSITIONS)
def test_only_a_table_of_positions_ends(case: str, caplog: pytest.LogCaptureFixture) -> None:
    family, settings, limited = POSITIONS[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **settings))
    ids = torch.full((1, 40), 5)

    def runs() -> bool:
        try:
            return bool(model.eval()(input_ids=ids, use_cache=False).logits.isfinite().all())
        except (IndexError, RuntimeError):
            return False

    def accepted() -> bool:
        try:
            check_fit(model, Examples([row(20, (20,))]), "train")
        except ModelError:
            return False
        return True

    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        assert accepted() == runs() == (not limited)
    assert ("40 tokens" in caplog.text) == (not limited and case != "no limit")


MIXTURES = [
    ("llama4_text", {"output_router_logits": True, "router_aux_loss_coef": 0.02}, "router_aux_loss_coef"),
    ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.02}, None),
    ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.0}, None),
    ("mixtral", {"output_router_logits": False, "router_aux_loss_coef": 0.02}, None),
    ("llama", {"aux_loss_alpha": 0.001}, "aux_loss_alpha"),
    ("llama", {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings", "named"), MIXTURES)
def test_a_loss_of_routers_that_is_not_trained_is_reported(
    family: str,
    settings: dict[str, Any],
    named: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, **settings,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        sft(AutoModelForCausalLM.from_config(config), tmp_path, GOOD)
    assert ("load-balancing" in caplog.text) == (named is not None)
    assert named is None or f"{named}={settings[named]}" in caplog.text
