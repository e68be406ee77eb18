"""Logged and evaluated metrics compared with means computed by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from tests.trainers.plain import PAIRS, plain_sums, rows_of, trained


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
                rewards__target_saturated=wanted.abs() > math.log(99),
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


def test_eval_metrics_are_of_the_evaluation_alone(start, make_trainer):
    rows = rows_of("dpo", PAIRS)
    trainer = make_trainer("dpo", copy.deepcopy(start), rows[:4], eval_rows=rows[4:])
    first = trainer.evaluate()["eval_logps/chosen"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():  # a loss computed by other code in between
        trainer.compute_loss(trainer.model, batch)
    assert trainer.evaluate()["eval_logps/chosen"] == first


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
    # Its weight is 0: it is logged and not trained.
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
