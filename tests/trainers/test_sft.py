"""SFT compared with the reference training: trained spans, the mean over all trained tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from rpo_trainer.errors import DataError, NonFiniteError, RecipeError
from rpo_trainer.trainers import SFTTrainer
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import (
    Objective,
    assert_bitwise_equal,
    assert_same_update,
    global_batches,
    make_rows,
    plain_sums,
    plain_train,
    trained,
)


def make_sft_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    return make_rows(seed, (1,) * n, spans=True)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_one_update_equals_plain_training(micro, layout, start, make_trainer):
    rows = make_sft_rows(8)
    assert any(0 in row["response_mask"][0] for row in rows)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, layout=layout, per_device_train_batch_size=micro,
        global_batch_size=8,
    )  # fmt: skip
    trainer.train()
    expected = plain_train(start, Objective("sft"), [rows], lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_steps_with_adamw_and_a_partial_last_batch(micro, start, make_trainer):
    rows = make_sft_rows(11)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, max_steps=5, optim="adamw_torch", learning_rate=1e-3,
        weight_decay=0.0, per_device_train_batch_size=micro, global_batch_size=4,
    )  # fmt: skip
    trainer.train()
    batches = [batch for epoch in range(2) for batch in global_batches(rows, 4, epoch=epoch)][:5]
    expected = plain_train(start, Objective("sft"), batches, lr=1e-3, optimizer="adamw")
    for a, b in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5)


def test_a_last_batch_that_is_not_full_can_be_left_out(start, make_trainer):
    rows = make_sft_rows(7)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, max_steps=-1, num_train_epochs=2, global_batch_size=4,
        dataloader_drop_last=True,
    )  # fmt: skip
    assert trainer.train().global_step == 2
    batches = [global_batches(rows, 4, epoch=epoch)[0] for epoch in range(2)]
    expected = plain_train(start, Objective("sft"), batches, lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


def test_without_shuffle_the_longest_come_first(start, make_trainer):
    rows = make_sft_rows(6)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, shuffle=False, max_steps=2, global_batch_size=2
    )
    trainer.train()
    batches = global_batches(rows, 2, shuffle=False)[:2]
    expected = plain_train(start, Objective("sft"), batches, lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


def test_data_seed_alone_decides_the_order(start, make_trainer):
    rows = make_sft_rows(8)

    def final(**settings: Any) -> Any:
        trainer = make_trainer(
            "sft", copy.deepcopy(start), rows, max_steps=2, global_batch_size=2, **settings
        )
        trainer.train()
        return trainer.model

    first = final(seed=1, data_seed=5)
    assert_bitwise_equal(first, final(seed=2, data_seed=5))
    with pytest.raises(AssertionError):
        assert_bitwise_equal(first, final(seed=1, data_seed=6))


def test_logged_and_eval_losses_are_means_over_all_tokens(start, make_trainer):
    rows = make_sft_rows(7)
    with torch.no_grad():
        nll = sum(-plain_sums(start, row)[0] for row in rows).item()
    mean = nll / sum(trained(row)[0] for row in rows).item()
    for batch in (1, 3, 50):
        trainer = make_trainer(
            "sft", copy.deepcopy(start), rows, eval_rows=rows, learning_rate=0.0,
            global_batch_size=2, max_steps=4, logging_strategy="steps", logging_steps=4,
            per_device_eval_batch_size=batch, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        trainer.train()
        logs = {k: v for line in trainer.state.log_history for k, v in line.items()}
        assert logs["loss/sft"] == pytest.approx(mean, rel=1e-6)
        assert logs["eval_loss"] == pytest.approx(mean, rel=1e-6)
        assert logs["eval_loss/sft"] == pytest.approx(mean, rel=1e-6)


def test_gradient_checkpointing_and_workers_change_nothing(start, make_trainer):
    rows = make_sft_rows(8)
    expected = plain_train(start, Objective("sft"), [rows], lr=0.1)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, gradient_checkpointing=True, dataloader_num_workers=2,
        global_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert_same_update(start, trainer.model, expected, 1e-5)


def test_rows_with_several_responses_are_refused(start, make_trainer):
    with raises("data.response-count", DataError, data="train", rows=2):
        make_trainer("sft", copy.deepcopy(start), make_rows(0, (1, 2, 1, 3)))


def test_another_trainers_config_is_refused(start, make_config, tokenizer):
    names = {"wanted": "rpo_trainer.SFTConfig", "given": "rpo_trainer.DPOConfig"}
    with raises("training.wrong-config", RecipeError, where="args", **names):
        SFTTrainer(copy.deepcopy(start), args=make_config("dpo"), processing_class=tokenizer)


def test_a_loss_that_is_not_finite_stops_before_the_update(start, make_trainer, injected):
    rows = make_sft_rows(6)
    rows[4]["prompt_ids"][0] = 2  # a token that only this row has
    model = copy.deepcopy(start)
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = math.inf
    before = copy.deepcopy(model)
    trainer = make_trainer("sft", model, rows, global_batch_size=6, per_device_train_batch_size=2)
    with raises("training.not-finite", NonFiniteError) as caught:
        trainer.train()
    assert caught.value.exit_code == 4
    assert "row-4" in caught.value.where
    assert len(caught.value.where.split(",")) == 2  # only the rows of one micro-batch
    assert_bitwise_equal(model, before)
    injected("SFT, the loss is not finite", "stopped")


def test_messages_train_every_assistant_turn(make_trainer):
    from rpo_trainer.data import set_chat_template
    from rpo_trainer.data.quickstart import character_tokenizer

    chat = set_chat_template(character_tokenizer(), "plain")
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 2
    trainer = make_trainer("sft", make_model(vocab_size=100), rows, processing_class=chat)
    row = trainer.train_dataset[0]
    (response,), (mask,) = row["response_ids"], row["response_mask"]
    text = chat.decode([t for t, m in zip(response, mask, strict=True) if m])
    assert "first" in text and "second" in text and "one" not in text and "two" not in text
    trainer.train()


def test_dropout_stays_on(make_trainer):
    """SFT does not require it to be off, so the model decides."""
    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    start = copy.deepcopy(model)
    rows = make_sft_rows(4)
    trainer = make_trainer("sft", model, rows, global_batch_size=4, learning_rate=1.0)
    trainer.train()
    without = plain_train(start.eval(), Objective("sft"), [rows], lr=1.0)
    with pytest.raises(AssertionError, match="the update is off"):
        assert_same_update(start, trainer.model, without, 1e-2)


def test_lora_trains_the_adapter_alone(start, tmp_path, make_trainer):
    from peft import LoraConfig, PeftModel

    rows = make_sft_rows(4)
    trainer = make_trainer(
        "sft", copy.deepcopy(start), rows, global_batch_size=4, max_steps=2,
        peft_config=LoraConfig(target_modules=["q_proj", "lm_head"], r=2),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "adapter").eval()
    trainer.model.eval()
    with torch.no_grad():
        moved = [(plain_sums(loaded, row) - plain_sums(start, row)).abs().item() for row in rows]
        for row in rows:
            torch.testing.assert_close(plain_sums(loaded, row), plain_sums(trainer.model, row))
    assert min(moved) > 0
    base = loaded.unload()
    assert_bitwise_equal(base, start)
