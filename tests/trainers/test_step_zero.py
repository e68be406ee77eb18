"""The step-0 check: when it passes, when it stops, and that no weights have changed then."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from rpo_trainer.errors import StepZeroError
from rpo_trainer.step import reference
from rpo_trainer.trainers.noise import disable_noise, is_noisy, noise_in
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import assert_bitwise_equal, make_rows


@pytest.fixture(scope="module")
def start() -> Any:
    return make_model()


def with_dropout(p: float = 0.1, family: str = "gpt2") -> Any:
    model = make_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = p
    return model


def closed_form(loss_type: str, rewards: list[float], beta: float) -> float:
    """The constants from the formulas with policy = reference."""
    if loss_type == "dpo":
        return math.log(2)
    if loss_type == "ipo":
        return (1 / (2 * beta)) ** 2
    k, gap = len(rewards), rewards[0] - rewards[1]
    weights = [math.exp(r) / sum(map(math.exp, rewards)) for r in rewards]
    if loss_type == "rpo_bwd_kl":  # ln K − H(softmax(rewards))
        return math.log(k) + sum(p * math.log(p) for p in weights)
    if loss_type == "rpo_fwd_kl":
        if k == 2:
            return math.log(math.cosh(gap / 2))
        return sum(math.log(1 / k / p) for p in weights) / k
    if loss_type == "rpo_sq":
        return gap**2
    others = [(sum(rewards) - r) / (k - 1) for r in rewards]
    return 0.5 * sum((r - o) ** 2 for r, o in zip(rewards, others, strict=True))


@pytest.mark.parametrize(
    ("kind", "loss_type", "ks", "settings"),
    [
        ("dpo", "dpo", (2,) * 6, {}),
        ("dpo", "dpo", (2,) * 6, {"label_smoothing": 0.3, "sft_loss_weight": 1.0}),
        ("dpo", "ipo", (2,) * 6, {"beta": 0.7}),
        ("rpo", "rpo_bwd_kl", (2,) * 6, {}),
        ("rpo", "rpo_fwd_kl", (2,) * 6, {"average_logps": True}),
        ("rpo", "rpo_sq", (2,) * 6, {}),
        ("rpo", "rpo_sqloo", (2, 3, 4, 2, 5, 2), {}),
        ("rpo", "rpo_bwd_kl", (2, 3, 4, 2, 5, 2), {}),
        ("rpo", "rpo_fwd_kl", (2, 3, 4, 2, 5, 2), {}),
    ],
)
def test_the_first_loss_is_the_constant_of_the_data(
    kind, loss_type, ks, settings, start, make_trainer
):
    rows = make_rows(0, ks, rewards=True)
    trainer = make_trainer(
        kind, copy.deepcopy(start), rows, loss_type=loss_type, global_batch_size=6,
        per_device_train_batch_size=3, **settings,
    )  # fmt: skip
    trainer.train()
    beta = settings.get("beta", 0.1)
    constant = sum(closed_form(loss_type, row["rewards"], beta) for row in rows) / len(rows)
    assert trainer.step_zero["loss"] == pytest.approx(constant, rel=1e-4)
    assert trainer.step_zero["expected"] == pytest.approx(constant, rel=1e-6)
    assert trainer.step_zero["nats_per_token"] < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_left_on_is_found_and_named(family, make_trainer):
    model = with_dropout(0.2, family)
    before = copy.deepcopy(model)
    trainer = make_trainer(
        "dpo", model, make_rows(0, (2,) * 4), disable_dropout=False, global_batch_size=4
    )
    with raises("training.step-zero", StepZeroError, cause="noise") as caught:
        trainer.train()
    assert caught.value.exit_code == 2 and "disable_dropout" in str(caught.value.fix)
    assert_bitwise_equal(model, before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_is_off_by_default(family, make_trainer):
    model = with_dropout(0.2, family)
    trainer = make_trainer("dpo", model, make_rows(0, (2,) * 4), global_batch_size=4)
    assert not noise_in(trainer.model) and not is_noisy(trainer.model)
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_noise_is_found_and_turned_off():
    for family in ("gpt2", "llama"):
        model = with_dropout(0.2, family)
        assert noise_in(model) and is_noisy(model)
        disable_noise(model, "a test")
        assert not noise_in(model) and not is_noisy(model)
    assert not noise_in(make_model()) and not is_noisy(make_model())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_stale_reference_stops_the_run_before_it_moves(optim, start, make_trainer, monkeypatch):
    own = reference.dataset_logprobs

    def stale(*args: Any, **kwargs: Any) -> list[list[float]]:
        return [[value - 0.5 for value in row] for row in own(*args, **kwargs)]

    monkeypatch.setattr(reference, "dataset_logprobs", stale)
    model = copy.deepcopy(start)
    trainer = make_trainer(
        "rpo", model, make_rows(0, (2, 3, 2, 2), rewards=True), optim=optim, global_batch_size=4
    )
    with raises("training.step-zero", StepZeroError, cause="reference") as error:
        trainer.train()
    assert "reference-cache" in str(error.value.fix)
    assert_bitwise_equal(model, start)


def test_a_shift_that_the_loss_does_not_show_is_found_too(start, make_trainer, monkeypatch):
    """Both responses are off by the same: DPO's loss is still ln 2, although its reference is wrong."""
    own = reference.dataset_logprobs
    monkeypatch.setattr(
        reference,
        "dataset_logprobs",
        lambda *a, **k: [[value + 3.0 for value in row] for row in own(*a, **k)],
    )
    trainer = make_trainer("dpo", copy.deepcopy(start), make_rows(0, (2,) * 4))
    with raises("training.step-zero", StepZeroError, cause="reference"):
        trainer.train()


def test_the_check_can_be_turned_off(make_trainer):
    trainer = make_trainer(
        "dpo", with_dropout(0.2), make_rows(0, (2,) * 4), disable_dropout=False, step0_check=False
    )
    assert trainer.train().global_step == 1
    assert not hasattr(trainer, "step_zero")


def test_another_reference_is_not_checked(start, make_trainer, caplog):
    caplog.set_level("INFO", "rpo_trainer")
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), make_rows(0, (2,) * 4), ref_model=make_model(seed=1)
    )
    trainer.train()
    assert not hasattr(trainer, "step_zero")
    (said,) = [r for r in caplog.records if r.name == "rpo_trainer.trainers.preference"]
    assert said.levelname == "INFO"


def test_an_equal_reference_is_checked(start, make_trainer):
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), make_rows(0, (2,) * 4), ref_model=copy.deepcopy(start)
    )
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_policy_itself_may_be_given_as_reference(start, make_trainer):
    model = copy.deepcopy(start)
    trainer = make_trainer("dpo", model, make_rows(0, (2,) * 4), ref_model=model, max_steps=2)
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_change_in_train_mode_that_is_not_random_is_told_apart(start, make_trainer):
    model = copy.deepcopy(start)

    def noise(module: Any, args: Any, output: Any) -> Any:
        return output * output.cos() if module.training else output

    model.model.norm.register_forward_hook(noise)
    trainer = make_trainer("dpo", model, make_rows(0, (2,) * 4))
    with raises("training.step-zero", StepZeroError, cause="train-mode"):
        trainer.train()


def test_only_the_first_step_is_checked(start, make_trainer):
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), make_rows(0, (2,) * 4), max_steps=3, learning_rate=10.0
    )
    assert trainer.train().global_step == 3
    trainer.args.max_steps = 6
    assert trainer.train().global_step == 6  # already trained: policy and reference differ
