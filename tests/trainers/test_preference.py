"""DPO and RPO against training written out plainly; what users of preference trainers expect."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import pytest
import torch

from rpo_trainer.errors import DataError, ModelError, NonFiniteError, RecipeError, StepZeroError
from rpo_trainer.trainers import DPOTrainer, RPOTrainer
from rpo_trainer.trainers.examples import Examples
from tests.models import make_model
from tests.trainers.plain import (
    Objective,
    assert_bitwise_equal,
    assert_same_update,
    global_batches,
    make_rows,
    plain_reference,
    plain_sums,
    plain_train,
    trained,
)

PAIRS = (2,) * 8
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


def rows_of(kind: str, ks: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    return make_rows(seed, ks, rewards=kind == "rpo")


def objective_of(kind: str, settings: dict[str, Any], reference: Any) -> Objective:
    loss_type = "dpo" if kind == "dpo" else "rpo_bwd_kl"
    return Objective(**{"kind": loss_type, "beta": 0.1, "reference": reference, **renamed(settings)})


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    return {("kind" if k == "loss_type" else k): v for k, v in settings.items()}


@pytest.fixture(scope="module")
def start() -> Any:
    return make_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def other() -> Any:
    """A reference that is not the policy, so that no gap is 0."""
    return make_model(dtype=torch.float64, seed=1)


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
    assert 0 < min(map(len, batches)) < 4  # a partial one is among them
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


# --- metrics ---


def by_hand(model: Any, other: Any, rows: list[dict[str, Any]], beta: float, scale: float):
    """Means over the rows of every metric, from plain forwards."""
    values: dict[str, list[float]] = {}

    def add(**found: float) -> None:
        for name, value in found.items():
            values.setdefault(name.replace("__", "/"), []).append(float(value))

    with torch.no_grad():
        for row in rows:
            sums, ref = plain_sums(model, row), plain_sums(other, row)
            implicit = beta * (sums - ref)
            target = scale * torch.tensor(row["rewards"], dtype=sums.dtype)
            gap = implicit[0] - implicit[1:].mean()
            wanted = target[0] - target[1:].mean()
            p, q = target.softmax(0), implicit.softmax(0)
            add(
                loss__preference=(p * (p / q).log()).sum(),
                loss__sft=-sums[0],
                rewards__chosen=implicit[0],
                rewards__rejected=implicit[1:].mean(),
                rewards__margins=gap,
                rewards__accuracies=(implicit[0] > implicit[1:]).double().mean(),
                rewards__target_gap=wanted,
                rewards__gap_error=(gap - wanted).abs(),
                logps__chosen=sums[0],
                logps__rejected=sums[1:].mean(),
                logps__chosen_delta=sums[0] - ref[0],
                logps__rejected_delta=(sums - ref)[1:].mean(),
                logps__chosen_falling=sums[0] < ref[0],
            )
    return {name: sum(v) / len(v) for name, v in values.items()}


def test_logged_metrics_are_means_over_the_whole_window(start, other, make_trainer):
    rows = rows_of("rpo", (2, 3, 5, 2, 5, 3, 2, 4, 2, 3, 2))
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), beta=0.3,
        reward_scale=0.5, learning_rate=0.0, global_batch_size=4, max_steps=6,
        logging_strategy="steps", logging_steps=3, sft_loss_weight=0.5,
    )  # fmt: skip
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logs] == [3, 6]
    expected = by_hand(start, other, rows, 0.3, 0.5)  # three steps are one epoch
    for line in logs:
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert {"grad_norm", "learning_rate", "epoch"} <= set(line)


def test_logged_loss_is_the_mean_of_the_steps_losses(start, other, make_trainer):
    rows = rows_of("rpo", PAIRS)
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(other), learning_rate=0.0,
        global_batch_size=4, max_steps=2, logging_strategy="steps", logging_steps=2,
        sft_loss_weight=0.5, per_device_train_batch_size=1,
    )  # fmt: skip
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    expected = by_hand(start, other, rows, 0.1, 1.0)
    total = expected["loss/preference"] + 0.5 * expected["loss/sft"]
    assert line["loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_eval_metrics_do_not_depend_on_the_batch(batch, start, other, make_trainer):
    rows = rows_of("rpo", (2, 3, 5, 2, 5, 3, 2))
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), None, ref_model=copy.deepcopy(other), eval_rows=rows,
        beta=0.3, sft_loss_weight=0.25, per_device_eval_batch_size=batch,
    )  # fmt: skip
    metrics = trainer.evaluate()
    expected = by_hand(start, other, rows, 0.3, 1.0)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    total = expected["loss/preference"] + 0.25 * expected["loss/sft"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)


def test_sft_term_is_logged_alone_and_token_mean_over_all_tokens(start, other, make_trainer):
    rows = rows_of("dpo", (2,) * 7)
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), None, ref_model=copy.deepcopy(other), eval_rows=rows,
        sft_reduction="token_mean",
    )  # fmt: skip
    metrics = trainer.evaluate()
    with torch.no_grad():
        nll = sum(-plain_sums(start, row)[0] for row in rows)
    tokens = sum(trained(row)[0] for row in rows)
    assert metrics["eval_loss/sft"] == pytest.approx((nll / tokens).item(), rel=1e-6)
    # Its weight is 0: it is watched and not trained.
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/preference"])
    assert "eval_rewards/target_gap" not in metrics


def test_eval_sets_by_name_and_during_training(start, make_trainer):
    seen = []
    rows = rows_of("rpo", PAIRS)
    sets = {"train": rows[:3], "held_out": rows_of("rpo", (2, 3, 2), seed=5)}
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, eval_rows=sets, max_steps=2, eval_strategy="steps",
        eval_steps=1, global_batch_size=4,
    )  # fmt: skip
    trainer.train()
    for line in trainer.state.log_history:
        seen += [name for name in line if name.endswith("rewards/margins")]
    assert seen == ["eval_train_rewards/margins", "eval_held_out_rewards/margins"] * 2
    values = trainer.evaluate()
    expected = by_hand(trainer.model, start, sets["held_out"], 0.1, 1.0)
    assert values["eval_held_out_rewards/margins"] == pytest.approx(
        expected["rewards/margins"], rel=1e-4, abs=1e-6
    )


def test_training_metrics_do_not_leak_from_one_train_to_the_next(start, make_trainer):
    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, global_batch_size=8, max_steps=1, learning_rate=5.0,
        logging_strategy="steps", logging_steps=2,
    )  # fmt: skip
    trainer.train()  # a window that is never logged
    trainer.args.logging_steps, trainer.args.learning_rate = 1, 0.0
    trainer.state.logging_steps = 1
    trainer.optimizer = None
    trainer.train()
    line = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
    assert line["loss"] == pytest.approx(line["loss/preference"], rel=1e-5)


# --- the reference ---


def test_eval_data_that_comes_later_takes_the_reference_at_hand(start, other, make_trainer):
    rows = rows_of("dpo", PAIRS)
    late = rows_of("dpo", (2, 2, 2), seed=9)
    own = make_trainer("dpo", copy.deepcopy(start), rows, global_batch_size=8)
    before = own.evaluate(late)
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    own.train()
    with pytest.raises(RecipeError, match="came after training"):
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
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), ref_model=make_model(vocab_size=80)
    )
    with pytest.raises(RecipeError, match="the reference has 80 tokens, the policy 61"):
        trainer.train()


def test_reference_model_is_left_as_it_was(start, other, make_trainer):
    ref = copy.deepcopy(other)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), ref_model=ref)
    trainer.train()
    assert_bitwise_equal(ref, other)
    assert all(p.grad is None for p in ref.parameters())


# --- what is refused ---


def test_rows_that_do_not_fit_the_loss_are_refused(start, make_trainer):
    with pytest.raises(DataError, match="3 rows of the train data have more than two responses"):
        make_trainer("dpo", copy.deepcopy(start), rows_of("dpo", (2, 3, 3, 2, 4)))
    with pytest.raises(DataError, match="rpo_sq is a loss of pairs"):
        make_trainer("rpo", copy.deepcopy(start), rows_of("rpo", (2, 3)), loss_type="rpo_sq")
    with pytest.raises(DataError, match="1 rows of the train data have one response"):
        make_trainer("rpo", copy.deepcopy(start), rows_of("rpo", (2, 1)))
    with pytest.raises(DataError, match="8 rows of the train data have no rewards"):
        make_trainer("rpo", copy.deepcopy(start), rows_of("dpo", PAIRS))
    with pytest.raises(DataError, match="of the eval data"):
        make_trainer("dpo", copy.deepcopy(start), None, eval_rows=rows_of("dpo", (3,)))
    some = rows_of("rpo", (2, 2))
    some[1]["rewards"] = None
    with pytest.raises(DataError, match=r"1 rows of the train data have no rewards.*\[1\]"):
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
    with pytest.raises(RecipeError, match="RPOTrainer takes a RPOConfig, got DPOConfig"):
        RPOTrainer(copy.deepcopy(start), args=make_config("dpo"), processing_class=tokenizer)
    from transformers import TrainingArguments

    with pytest.raises(RecipeError, match="DPOTrainer takes a DPOConfig, got TrainingArguments"):
        DPOTrainer(
            copy.deepcopy(start),
            args=TrainingArguments(report_to="none", use_cpu=True),
            processing_class=tokenizer,
        )


def test_several_gpus_in_one_process_are_refused(start, make_config, tokenizer, monkeypatch):
    args = make_config("dpo")
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 4))
    with pytest.raises(RecipeError, match=r"4 GPUs are visible to one process(.|\n)*torchrun"):
        DPOTrainer(copy.deepcopy(start), args=args, processing_class=tokenizer)


def test_a_model_without_a_tokenizer_is_refused(start, make_config):
    with pytest.raises(ModelError, match=r"no tokenizer(.|\n)*processing_class"):
        DPOTrainer(copy.deepcopy(start), args=make_config("dpo"))


# --- guards ---


@pytest.mark.parametrize("kind", ["reward", "infinite weight"])
def test_a_loss_that_is_not_finite_stops_before_the_update(kind, start, other, make_trainer):
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
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 1") as caught:
        trainer.train()
    assert caught.value.exit_code == 4
    assert caught.value.where == "rows row-5"
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_gradient_that_is_not_finite_stops_before_the_update(start, make_trainer):
    model = copy.deepcopy(start)
    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = copy.deepcopy(model)
    trainer = make_trainer(
        "dpo", model, rows_of("dpo", (2, 2)), step0_check=False, max_grad_norm=1.0
    )
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 1"):
        trainer.train()
    assert_bitwise_equal(model, before)


# --- adapters ---


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **settings})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(checkpointing, tmp_path, make_trainer, start):
    from peft import PeftModel

    rows = rows_of("rpo", PAIRS)
    trainer = make_trainer(
        "rpo", copy.deepcopy(start), rows, peft_config=lora(lora_dropout=0.2),
        global_batch_size=8, max_steps=3, learning_rate=1.0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer.train()
    assert trainer.step_zero["nats_per_token"] < 1e-6
    base = {n: p for n, p in trainer.model.named_parameters() if "lora_" not in n}
    for name, p in start.named_parameters():
        stem, leaf = name.rsplit(".", 1)
        found = next(q for n, q in base.items() if n.endswith((name, f"{stem}.base_layer.{leaf}")))
        assert torch.equal(found, p), name
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)

    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "adapter").eval()
    trainer.model.eval()
    with torch.no_grad():
        for row in rows:
            torch.testing.assert_close(plain_sums(loaded, row), plain_sums(trainer.model, row))


def test_a_second_adapter_is_refused(start, make_trainer):
    from peft import get_peft_model

    with pytest.raises(ModelError, match="has an adapter already"):
        make_trainer(
            "dpo", get_peft_model(copy.deepcopy(start), lora()), rows_of("dpo", PAIRS),
            peft_config=lora(),
        )  # fmt: skip


def test_an_adapter_in_training_is_its_own_reference(start, make_trainer):
    """LoRA chains re-base: the reference is the model with the adapter that the stage starts from."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(start), lora(init_lora_weights=False))
    rows = rows_of("dpo", PAIRS)
    with_adapter = plain_reference(model.eval(), rows)
    trainer = make_trainer("dpo", model, rows, global_batch_size=8)
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row, values in zip(rows, trainer.train_dataset.extra["reference_logps"], strict=True):
        assert values == pytest.approx(with_adapter[row["id"]].tolist(), rel=1e-5)


# --- what users of TRL expect ---


def test_callbacks_are_called_with_our_metrics(start, make_trainer):
    from transformers import TrainerCallback

    calls: list[str] = []
    logged: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            calls.append("begin")

        def on_step_end(self, *args, **kwargs):
            calls.append("step")

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            calls.append("evaluate")
            assert "eval_rewards/margins" in metrics

        def on_train_end(self, *args, **kwargs):
            calls.append("end")

    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, eval_rows=rows[:3], callbacks=[Watch()], max_steps=2,
        logging_strategy="steps", logging_steps=1, eval_strategy="epoch", global_batch_size=4,
    )  # fmt: skip
    result = trainer.train()
    assert calls == ["begin", "step", "step", "evaluate", "end"]
    assert "rewards/accuracies" in logged[0]
    assert result.global_step == 2 and math.isfinite(result.training_loss)


def test_a_list_a_dataset_and_examples_are_the_same_data(start, make_trainer):
    import datasets

    rows = rows_of("rpo", (2, 3, 2, 4))
    models = []
    for data in (rows, datasets.Dataset.from_list(rows), Examples(rows)):
        trainer = make_trainer("rpo", copy.deepcopy(start), data, global_batch_size=4)
        trainer.train()
        models.append(trainer.model)
    assert_bitwise_equal(models[0], models[1])
    assert_bitwise_equal(models[0], models[2])


@pytest.fixture(scope="module")
def character_model() -> Any:
    return make_model(vocab_size=100)


TEXTS = [
    {"prompt": f"question {i}: ", "chosen": "yes " * (i + 1), "rejected": "no", "chosen_reward": 1.5 + i,
     "rejected_reward": 1.0}
    for i in range(4)
]  # fmt: skip


def test_raw_text_rows_are_tokenised(character_model, make_trainer, tokenizer):
    trainer = make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=None)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<s>question 0: "
    assert [tokenizer.decode(r) for r in row["response_ids"]] == ["yes </s>", "no</s>"]
    assert row["rewards"] == [1.5, 1.0]
    assert row["response_mask"] == [[1] * 5, [1] * 3]
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(trainer.step_zero["expected"], abs=1e-6)


def test_rows_too_long_are_dropped_and_counted(character_model, make_trainer):
    trainer = make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=24)
    assert len(trainer.train_dataset) == 2
    assert trainer.audits["train"].dropped["too_long"].count == 2
    with pytest.raises(DataError, match="no row is left"):
        make_trainer("rpo", copy.deepcopy(character_model), TEXTS, max_length=5)


def test_messages_go_through_the_chat_template(character_model, make_trainer):
    from rpo_trainer.data import set_chat_template
    from rpo_trainer.quickstart import character_tokenizer

    chat = set_chat_template(character_tokenizer(), "plain")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(2)
    ]
    trainer = make_trainer("dpo", copy.deepcopy(character_model), rows, processing_class=chat)
    row = trainer.train_dataset[0]
    assert "question 0" in chat.decode(row["prompt_ids"])
    texts = [chat.decode(r).strip() for r in row["response_ids"]]
    assert texts[0].startswith("yes") and texts[1].startswith("no")
    trainer.train()


def test_a_path_is_loaded_trained_and_saved_again(character_model, tmp_path, make_trainer, make_config, tokenizer):  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "start"
    character_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = RPOTrainer(
        str(folder), ref_model=str(folder), args=make_config("rpo"), train_dataset=TEXTS
    )
    assert trainer.processing_class.vocab_size == 100
    trainer.train()
    assert trainer.step_zero["nats_per_token"] < 1e-4  # the same weights: the check ran
    trainer.save_model(str(tmp_path / "end"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert_bitwise_equal(loaded, trainer.model)
    assert loaded.config._attn_implementation != "rpo_packed"
    assert AutoTokenizer.from_pretrained(tmp_path / "end").vocab_size == 100
    ids = torch.tensor([[1, 20, 30, 40]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model(ids).logits)


def test_evaluate_first_and_train_then_still_checks_step_zero(start, make_trainer):
    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows, eval_rows=rows[:2])
    trainer.evaluate()
    with torch.no_grad():  # behind the trainer's back
        trainer.model.lm_head.weight.mul_(1.1)
    with pytest.raises(StepZeroError):
        trainer.train()


def test_default_arguments_are_those_of_the_class(start, tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(copy.deepcopy(start), processing_class=tokenizer)
    assert trainer.args.output_dir == "trainer_output" and trainer.args.beta == 0.1
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


def test_namespace_stays_clean(start, make_trainer):
    """A trainer leaves a model that others can use: stock calls and generation give what they gave."""
    model = copy.deepcopy(start)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
    make_trainer("dpo", model, rows_of("dpo", PAIRS))
    assert isinstance(model.forward, types.FunctionType | types.MethodType)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, before)
