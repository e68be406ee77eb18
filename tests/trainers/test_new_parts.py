"""New parts of a model with an adapter: heads and weights without a file are trained and saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rpo_trainer import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError
from rpo_trainer.models.reward_model import as_reward_model
from tests.small_models import make_model

PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no"} for n in range(8)]
ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]


def args(cls: Any, folder: Path, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 3,
        "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return cls(**{**settings, **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model(vocab_size=100, pad_token_id=3).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes})


def trainer_of(model: Any, folder: Path, config: LoraConfig | None, **more: Any) -> RewardTrainer:
    return RewardTrainer(
        model, args=args(RewardConfig, folder, **more), train_dataset=PAIRS,
        processing_class=character_tokenizer(), peft_config=config,
    )  # fmt: skip


def scores(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits  # type: ignore[no-any-return]


def again(base: Path, saved: Path) -> nn.Module:
    """The adapter by PEFT alone, on a base with another random head."""
    torch.manual_seed(11)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 3
    return PeftModel.from_pretrained(classifier, saved)


SETTINGS: dict[str, dict[str, Any]] = {
    "no task": {"task_type": None},
    "classification": {"task_type": "SEQ_CLS"},
    "language modeling": {"task_type": "CAUSAL_LM"},
    "another module too": {"task_type": "CAUSAL_LM", "modules_to_save": ["norm"]},
    "the head named": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    "all linear layers": {"task_type": None, "target_modules": "all-linear"},
    "the head as a target": {"task_type": None, "target_modules": ["q_proj", "score"]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_new_head_is_trained_and_comes_back(case: str, base: Path, tmp_path: Path) -> None:
    config = lora(**SETTINGS[case])
    trainer = trainer_of(str(base), tmp_path / "out", config)
    heads = {
        n: p.detach().clone()
        for n, p in trainer.model.named_parameters()
        if "score.modules_to_save" in n
    }
    assert len(heads) == 1
    trainer.train()
    assert all(
        not torch.equal(p, heads[n]) for n, p in trainer.model.named_parameters() if n in heads
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.allclose(scores(trainer.model), scores(again(base, tmp_path / "saved")), atol=1e-5)
    assert config.task_type == SETTINGS[case]["task_type"]  # the caller's config is unchanged


def test_a_resumed_head_is_that_of_an_uninterrupted_training(base: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_of(str(base), tmp_path / "a", lora(), **saving)
    whole.train()
    first = trainer_of(str(base), tmp_path / "a", lora(), **saving)
    first.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(scores(first.model), scores(whole.model))


def test_what_is_added_is_reported(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        trainer_of(str(base), tmp_path, lora(task_type="CAUSAL_LM"))
    assert "score" in caplog.text and "SEQ_CLS, not CAUSAL_LM" in caplog.text


def test_a_head_that_somebody_else_froze(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrapped(model: Any, **settings: Any) -> Any:
        model.config.pad_token_id = 3
        return get_peft_model(model, lora(**settings))

    # Created by this package, or by transformers from a directory without a head.
    made = as_reward_model(AutoModelForCausalLM.from_pretrained(base))
    loaded = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    for model in (made, loaded):
        with pytest.raises(ModelError, match=r"score\.weight"):
            trainer_of(wrapped(model), tmp_path / "out", None)
    trainer = trainer_of(
        wrapped(as_reward_model(AutoModelForCausalLM.from_pretrained(base)), task_type="SEQ_CLS"),
        tmp_path / "out", None,
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.allclose(scores(trainer.model), scores(again(base, tmp_path / "saved")))
    # A head that was trained before may stay frozen, with a warning.
    trained = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    trained.save_pretrained(tmp_path / "trained")
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        trainer_of(wrapped(before), tmp_path / "out", None)
    assert "(score) frozen" in caplog.text


def test_weights_that_somebody_else_let_transformers_draw(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(vocab_size=100).model.save_pretrained(tmp_path / "decoder")
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        for source in (base, tmp_path / "decoder"):
            SFTTrainer(
                AutoModelForCausalLM.from_pretrained(source), args=args(SFTConfig, tmp_path / "out"),
                train_dataset=ROWS, processing_class=character_tokenizer(),
            )  # fmt: skip
            assert ("(lm_head.weight)" in caplog.text) == (source != base)
        caplog.clear()
        trainer_of(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path, None
        )
    assert "at random" not in caplog.text  # a new head of a reward model is trained


def test_a_language_head_that_no_file_has(base: Path, tmp_path: Path) -> None:
    """transformers draws it when the model is loaded by hand, and logs a table."""
    make_model(vocab_size=100).model.save_pretrained(tmp_path / "decoder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    options = {
        "args": args(SFTConfig, tmp_path / "out"), "train_dataset": ROWS,
        "processing_class": character_tokenizer(),
    }  # fmt: skip
    wrapped = get_peft_model(model, lora(task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        SFTTrainer(wrapped, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    trainer = SFTTrainer(model, peft_config=lora(task_type="CAUSAL_LM"), **options)
    head = trainer.model.get_output_embeddings().weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_output_embeddings().weight, head)
    trainer.save_model(str(tmp_path / "saved"))
    names = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert names["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize("trained", [False, True])
def test_new_rows_of_the_embeddings(
    trained: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(104)
    more = {"trainable_token_indices": {"embed_tokens": [100, 101]}} if trained else {}
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        SFTTrainer(
            model, args=args(SFTConfig, tmp_path / "out"), train_dataset=ROWS,
            processing_class=character_tokenizer(),
            peft_config=lora(task_type="CAUSAL_LM", **more),
        )  # fmt: skip
    assert ("embed_tokens.weight" in caplog.text) != trained


def test_a_saved_adapter_finds_its_base_from_anywhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    trainer = SFTTrainer(
        "./base", args=args(SFTConfig, tmp_path / "out", save_strategy="steps", save_steps=3),
        train_dataset=ROWS, peft_config=lora(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-3"):
        found = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(scores(found), scores(trainer.model), atol=1e-5)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_that_an_adapter_trains_whole(modules: list[str], tmp_path: Path) -> None:
    model = make_model(vocab_size=100, tie_word_embeddings=True)
    trainer = SFTTrainer(
        model, args=args(SFTConfig, tmp_path / "out"), train_dataset=ROWS,
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="CAUSAL_LM", modules_to_save=modules),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = make_model(vocab_size=100, tie_word_embeddings=True)
    found = PeftModel.from_pretrained(base, tmp_path / "saved")
    assert torch.allclose(scores(found), scores(trainer.model), atol=1e-5)
