"""DPO and RPO compared with the reference training, and what they refuse."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch

from rpo_trainer.errors import DataError, ModelError, NonFiniteError, RecipeError
from rpo_trainer.trainers import DPOTrainer, RPOTrainer
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import (
    PAIRS,
    Objective,
    assert_bitwise_equal,
    assert_same_update,
    global_batches,
    plain_reference,
    plain_sums,
    plain_train,
    rows_of,
)

CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "dpo": ("dpo", PAIRS, {}),
    "dpo + sft sum": ("dpo", PAIRS, {"sft_loss_weight": 0.3}),
    "dpo + sft token_mean": (
        "dpo",
        PAIRS,
        {"sft_loss_weight": 3.0, "sft_reduction": "token_mean"},
    ),
    "dpo + sft sequence_mean": (
        "dpo",
        PAIRS,
        {"sft_loss_weight": 3.0, "sft_reduction": "sequence_mean"},
    ),
    "dpo by tokens": ("dpo", PAIRS, {"average_logps": True, "beta": 2.0, "sft_loss_weight": 0.1}),
    "cdpo": ("dpo", PAIRS, {"label_smoothing": 0.2}),
    "ipo": ("dpo", PAIRS, {"loss_type": "ipo"}),
    "rpo_bwd_kl pairs": ("rpo", PAIRS, {"loss_type": "rpo_bwd_kl", "reward_scale": 0.5}),
    "rpo_fwd_kl pairs": ("rpo", PAIRS, {"loss_type": "rpo_fwd_kl"}),
    "rpo_sq pairs": ("rpo", PAIRS, {"loss_type": "rpo_sq", "sft_loss_weight": 0.01}),
    "rpo_sqloo pairs": ("rpo", PAIRS, {"loss_type": "rpo_sqloo"}),
    "rpo_bwd_kl of four": ("rpo", (4,) * 8, {"loss_type": "rpo_bwd_kl", "sft_loss_weight": 0.01}),
    "rpo_bwd_kl mixed": (
        "rpo",
        (2, 3, 5, 2, 5, 3, 2, 4),
        {"sft_loss_weight": 1.0, "sft_reduction": "token_mean"},
    ),
    "rpo_fwd_kl mixed": ("rpo", (2, 3, 5, 2, 5, 3, 2, 4), {"loss_type": "rpo_fwd_kl"}),
    "rpo_sqloo mixed": ("rpo", (2, 3, 5, 2, 5, 3, 2, 4), {"loss_type": "rpo_sqloo"}),
    "rpo by tokens": ("rpo", (2, 3, 2, 4, 2, 2, 3, 2), {"average_logps": True, "beta": 1.0}),
}


def objective_of(kind: str, settings: dict[str, Any], reference: Any) -> Objective:
    loss_type = "dpo" if kind == "dpo" else "rpo_bwd_kl"
    return Objective(
        **{"kind": loss_type, "beta": 0.1, "reference": reference, **renamed(settings)}
    )


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {("kind" if k == "loss_type" else k): v for k, v in settings.items()}


# --- one update ---


@pytest.mark.parametrize("case", CASES)
def test_one_update_equals_plain_training(case, start, other, make_trainer):
    kind, ks, settings = CASES[case]
    rows = rows_of(kind, ks)
    trainer = make_trainer(
        kind, copy.deepcopy(start), rows, ref_model=copy.deepcopy(other),
        global_batch_size=8, **settings,
    )  # fmt: skip
    trainer.train()
    objective = objective_of(kind, settings, plain_reference(other, rows))
    expected = plain_train(start, objective, [rows], lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_update_does_not_depend_on_micro_batch_or_layout(micro, layout, start, other, make_trainer):
    rows = rows_of("rpo", (2, 3, 5, 2, 5, 3, 2, 4))
    settings = {"sft_loss_weight": 0.5, "sft_reduction": "token_mean"}
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), layout=layout,
        per_device_train_batch_size=micro, global_batch_size=8, **settings,
    )  # fmt: skip
    assert trainer.layout == layout
    assert trainer.args.gradient_accumulation_steps == 8 // micro
    trainer.train()
    objective = objective_of("rpo", settings, plain_reference(other, rows))
    expected = plain_train(start, objective, [rows], lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


def test_update_does_not_depend_on_the_order_of_the_rows(start, other, make_trainer):
    rows = rows_of("rpo", (2, 3, 5, 2, 5, 3, 2, 4))
    moved = []
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        trainer = make_trainer(
            "rpo", copy.deepcopy(start), order, ref_model=copy.deepcopy(other), global_batch_size=8
        )
        trainer.train()
        moved.append(trainer.model)
    assert_same_update(start, moved[1], moved[0], 1e-5)
    assert_same_update(start, moved[2], moved[0], 1e-5)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("examples", [13, 15, 9])
def test_steps_with_adamw_and_a_partial_last_batch(micro, examples, start, other, make_trainer):
    rows = rows_of("dpo", (2,) * examples)
    settings = {"sft_loss_weight": 0.5, "sft_reduction": "token_mean"}
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), max_steps=5,
        per_device_train_batch_size=micro, global_batch_size=4, optim="adamw_torch",
        learning_rate=1e-3, weight_decay=0.0, **settings,
    )  # fmt: skip
    trainer.train()
    batches = [batch for epoch in range(2) for batch in global_batches(rows, 4, epoch=epoch)][:5]
    assert 0 < min(map(len, batches)) < 4  # a partial batch is among them
    objective = objective_of("dpo", settings, plain_reference(other, rows))
    expected = plain_train(start, objective, batches, lr=1e-3, optimizer="adamw")
    worst = max(
        (a - b).abs().max().item()
        for a, b in zip(trainer.model.parameters(), expected.parameters(), strict=True)
    )
    assert worst < 1e-5


def test_float32_update_equals_plain_training(make_trainer):
    start = make_model()
    rows = rows_of("rpo", (2, 3, 5, 2))
    other = make_model(seed=1)
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), global_batch_size=4,
        learning_rate=1.0,
    )  # fmt: skip
    trainer.train()
    expected = plain_train(
        start, objective_of("rpo", {}, plain_reference(other, rows)), [rows], lr=1.0
    )
    assert_same_update(start, trainer.model, expected, 5e-3)


def test_without_ref_model_the_reference_stays_the_start(start, make_trainer):
    rows = rows_of("rpo", PAIRS)
    trainer = make_trainer("rpo", copy.deepcopy(start), rows, global_batch_size=8, max_steps=3)
    trainer.train()
    objective = objective_of("rpo", {}, plain_reference(start, rows))
    expected = plain_train(start, objective, [rows] * 3, lr=0.1)
    assert_same_update(start, trainer.model, expected, 1e-5)


def test_loader_workers_change_nothing(start, make_trainer):
    rows = rows_of("rpo", (2, 3, 5, 2, 5, 3, 2, 4))
    models = []
    for workers in (0, 2):
        trainer = make_trainer(
            "rpo", copy.deepcopy(start), rows, global_batch_size=4, max_steps=3,
            dataloader_num_workers=workers,
        )  # fmt: skip
        trainer.train()
        models.append(trainer.model)
    assert_bitwise_equal(*models)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(checkpointing, start, make_trainer):
    rows = rows_of("rpo", PAIRS)
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, global_batch_size=8,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer.train()
    assert trainer.model.model.layers[0].gradient_checkpointing is checkpointing
    expected = plain_train(
        start, objective_of("rpo", {}, plain_reference(start, rows)), [rows], lr=0.1
    )
    assert_same_update(start, trainer.model, expected, 1e-5)


# --- the reference ---


def test_eval_data_that_comes_later_takes_the_reference_at_hand(start, other, make_trainer):
    rows = rows_of("dpo", PAIRS)
    late = rows_of("dpo", (2, 2, 2), seed=9)
    own = make_trainer("dpo", copy.deepcopy(start), rows, global_batch_size=8)
    before = own.evaluate(late)
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    own.train()
    with raises("training.reference-gone", RecipeError, where="eval_dataset"):
        own.evaluate(rows_of("dpo", (2,), seed=10))
    given = make_trainer(
        "dpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), global_batch_size=8
    )
    given.train()
    after = given.evaluate(late)["eval_logps/chosen_delta"]
    with torch.no_grad():
        wanted = [plain_sums(given.model, r)[0] - plain_sums(other, r)[0] for r in late]
    assert after == pytest.approx((sum(wanted) / 3).item(), rel=1e-5)


def test_reference_of_another_vocabulary_is_refused(start, make_trainer):
    other = make_model(vocab_size=80)
    with raises("tokenizer.mismatch", RecipeError) as error:
        make_trainer("dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), ref_model=other)
    assert {"80", "61"} <= set(re.findall(r"\d+", error.value.what))


def test_reference_model_is_left_as_it_was(start, other, make_trainer):
    ref = copy.deepcopy(other)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), ref_model=ref)
    trainer.train()
    assert_bitwise_equal(ref, other)
    assert all(p.grad is None for p in ref.parameters())


# --- what is refused ---


def test_rows_that_do_not_fit_the_loss_are_refused(start, make_trainer):
    with raises("data.response-count", DataError, data="train", rows=3):
        make_trainer("dpo", copy.deepcopy(start), rows_of("dpo", (2, 3, 3, 2, 4)))
    with raises("data.response-count", DataError, data="train", rows=1) as error:
        make_trainer("rpo", copy.deepcopy(start), rows_of("rpo", (2, 3)), loss_type="rpo_sq")
    assert "rpo_sq" in str(error.value.why)
    with raises("data.response-count", DataError, data="train", rows=1):
        make_trainer("rpo", copy.deepcopy(start), rows_of("rpo", (2, 1)))
    with raises("data.missing-rewards", DataError, data="train", rows=[*range(8)]):
        make_trainer("rpo", copy.deepcopy(start), rows_of("dpo", PAIRS))
    with raises("data.response-count", DataError, data="eval", rows=1):
        make_trainer("dpo", copy.deepcopy(start), None, eval_rows=rows_of("dpo", (3,)))
    some = rows_of("rpo", (2, 2))
    some[1]["rewards"] = None
    with raises("data.missing-rewards", DataError, data="train", rows=[1]):
        make_trainer("rpo", copy.deepcopy(start), some)
    with pytest.raises(DataError, match="no rows"):
        make_trainer("dpo", copy.deepcopy(start), [])


@pytest.mark.parametrize("field", ["rewards", "response_mask", "prompt_ids"])
def test_rows_that_do_not_fit_themselves_are_refused(field, start, make_trainer):
    rows = rows_of("rpo", PAIRS)
    rows[3][field] = {
        "rewards": [1.0, 2.0, 3.0],
        "response_mask": [[1], [1]],
        "prompt_ids": [],
    }[field]
    trainer = make_trainer("rpo", copy.deepcopy(start), rows, global_batch_size=8)
    with pytest.raises(ValueError, match="row row-3 has"):
        trainer.train()


def test_another_trainers_config_is_refused(start, make_config, tokenizer):
    names = {"wanted": "rpo_trainer.RPOConfig", "given": "rpo_trainer.DPOConfig"}
    with raises("training.wrong-config", RecipeError, where="args", **names):
        RPOTrainer(copy.deepcopy(start), args=make_config("dpo"), processing_class=tokenizer)
    from transformers import TrainingArguments

    names = {"wanted": "rpo_trainer.DPOConfig", "given": "transformers.TrainingArguments"}
    with raises("training.wrong-config", RecipeError, where="args", **names):
        DPOTrainer(
            copy.deepcopy(start),
            args=TrainingArguments(report_to="none", use_cpu=True),
            processing_class=tokenizer,
        )


def test_several_gpus_in_one_process_are_refused(start, make_config, tokenizer, monkeypatch):
    args = make_config("dpo")
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 4))
    with raises("training.several-gpus", RecipeError) as error:
        DPOTrainer(copy.deepcopy(start), args=args, processing_class=tokenizer)
    assert "4" in error.value.what and "torchrun" in str(error.value.fix)


def test_a_model_without_a_tokenizer_is_refused(start, make_config):
    with raises("tokenizer.missing", ModelError) as error:
        DPOTrainer(copy.deepcopy(start), args=make_config("dpo"))
    assert "processing_class" in str(error.value.fix)


# --- guards ---


@pytest.mark.parametrize("kind", ["reward", "infinite weight"])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    kind, start, other, make_trainer, injected
):
    rows = rows_of("rpo", PAIRS)
    model = copy.deepcopy(start)
    if kind == "reward":
        rows[5]["rewards"] = [math.nan, 0.0]
    else:
        # A token that only this row has.
        rows[5]["response_ids"][0][0] = 2
        with torch.no_grad():
            model.model.embed_tokens.weight[2] = math.nan
    before = copy.deepcopy(model)
    trainer = make_trainer(
        "rpo", model, rows, ref_model=copy.deepcopy(other), global_batch_size=8,
        per_device_train_batch_size=1, optim="adamw_torch",
    )  # fmt: skip
    with raises("training.not-finite", NonFiniteError, what="loss") as caught:
        trainer.train()
    assert caught.value.exit_code == 4 and caught.value.details["step"] == 1
    assert caught.value.where == "rows row-5"
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    injected(f"RPO, the loss is not finite: {kind}", "stopped")


def test_a_gradient_that_is_not_finite_stops_before_the_update(start, make_trainer, injected):
    model = copy.deepcopy(start)
    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = copy.deepcopy(model)
    trainer = make_trainer(
        "dpo", model, rows_of("dpo", (2, 2)), step0_check=False, max_grad_norm=1.0
    )
    with raises("training.not-finite", NonFiniteError, what="gradient", step=1):
        trainer.train()
    assert_bitwise_equal(model, before)
    injected("DPO, the gradient is not finite", "stopped")
