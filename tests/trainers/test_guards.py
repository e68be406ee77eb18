"""A non-finite step: the run stops, or the step is skipped without a trace."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rpo_trainer.errors import NonFiniteError, RecipeError
from tests.raising import raises
from tests.trainers.plain import assert_bitwise_equal, make_rows

STEPS = 6  # twelve rows in batches of four: two epochs of three steps


def rows_of(kind: str) -> list[dict[str, Any]]:
    return make_rows(0, (1,) * 12 if kind == "sft" else (2,) * 12, rewards=kind == "rpo")


@pytest.fixture
def trainer_of(make_trainer, start, tmp_path):
    """A trainer with non-finite values at the given steps (from 0), every time it reaches them."""

    def make(kind: str, bad: dict[int, str], out: str = "out", **settings: Any) -> Any:
        trainer = make_trainer(
            kind, copy.deepcopy(start).float(), rows_of(kind),
            **{
                "output_dir": str(tmp_path / out), "max_steps": STEPS, "global_batch_size": 4,
                "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
                "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "save_strategy": "steps",
                "save_steps": 1, "save_total_limit": 9, "logging_strategy": "steps",
                "logging_steps": 1, "on_nonfinite": "skip", **settings,
            },
        )  # fmt: skip
        losses = trainer.losses

        def spoiled(sums: Any, batch: Any) -> Any:
            how = bad.get(trainer.state.global_step) if trainer.model.training else None
            if how == "gradient":
                sums.register_hook(lambda grad: grad * torch.nan)
            return losses(sums * torch.inf if how == "loss" else sums, batch)

        trainer.losses = spoiled
        return trainer

    return make


def weights(trainer: Any) -> list[Any]:
    return [p.detach().clone() for p in trainer.model.parameters()]


class Watch(TrainerCallback):
    """Weights and optimizer state after each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seen: list[Any] = [(weights(trainer), None, None)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = copy.deepcopy(self.trainer.optimizer.state_dict()["state"])
        ids = [row for one in self.trainer.step_guard.skipped for row in one["rows"]]
        self.seen.append((weights(self.trainer), optimizer, ids))


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
def test_a_step_left_out_moves_nothing_and_the_next_ones_go_on(
    how, kind, trainer_of, caplog, injected
):
    trainer = trainer_of(kind, {2: how})
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.global_step == STEPS
    for before, after in zip(watch.seen[2][0], watch.seen[3][0], strict=True):
        assert torch.equal(before, after)
    for key, state in watch.seen[2][1].items():
        for name, value in state.items():
            assert torch.equal(value, watch.seen[3][1][key][name]), name
    assert all(p.isfinite().all() for p in watch.seen[STEPS][0])
    moved = [any(not torch.equal(a, b) for a, b in zip(x[0], y[0], strict=True))
             for x, y in zip(watch.seen, watch.seen[1:], strict=False)]  # fmt: skip
    assert moved == [True, True, False, True, True, True]
    (skipped,) = trainer.step_guard.skipped
    assert (skipped["step"], skipped["what"], len(skipped["rows"])) == (3, how, 4)
    (said,) = [r for r in caplog.records if r.name == "rpo_trainer.trainers.guards"]
    assert said.levelname == "WARNING" and said.args[:4] == (how, 3, 1, 3)
    assert skipped["rows"][0] in said.getMessage()
    injected(f"{kind}, a {how} is not finite under skip", "survived")


def test_the_data_goes_on_and_so_does_the_schedule(trainer_of):
    orders: list[list[str]] = []
    for bad in ({}, {2: "loss"}):
        trainer = trainer_of("sft", bad, f"out-{len(bad)}")
        seen: list[str] = []
        loss = trainer.losses
        trainer.losses = lambda sums, batch, loss=loss, seen=seen: (
            seen.extend(batch.ids), loss(sums, batch),
        )[1]  # fmt: skip
        trainer.train()
        rates = [x["learning_rate"] for x in trainer.state.log_history if "learning_rate" in x]
        orders.append([*seen, *map(str, rates)])
    assert orders[0] == orders[1]


def test_it_is_the_run_whose_optimizer_was_not_called_there(trainer_of):
    """The reference: the same run without the guard, in which the update is skipped by hand."""
    skipping = trainer_of("rpo", {1: "loss", 4: "gradient"})
    skipping.train()
    by_hand = trainer_of("rpo", {}, "by-hand", on_nonfinite="stop")

    class LeaveOut(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, 4):
                for parameter in by_hand.model.parameters():
                    parameter.grad = None

    by_hand.add_callback(LeaveOut())
    by_hand.train()
    assert_bitwise_equal(skipping.model, by_hand.model)


def test_log_lines_are_means_of_the_steps_that_were_taken(trainer_of):
    every = trainer_of("rpo", {1: "loss", 5: "loss"}, logging_steps=1)
    every.train()
    lines = [line for line in every.state.log_history if "learning_rate" in line]
    assert ["loss" in line for line in lines] == [True, False, True, True, True, False]
    assert ["grad_norm" in line for line in lines] == ["loss" in line for line in lines]
    assert [line.get("nonfinite/skipped") for line in lines] == [None, 1, 1, 1, 1, 2]
    json.dumps(lines, allow_nan=False)
    pairs = trainer_of("rpo", {1: "loss", 5: "loss"}, "pairs", logging_steps=2)
    pairs.train()
    means = [line for line in pairs.state.log_history if "learning_rate" in line]
    json.dumps(means, allow_nan=False)
    assert means[0]["loss"] == pytest.approx(
        lines[0]["loss"], rel=1e-6
    )  # its other step is skipped
    assert means[1]["loss"] == pytest.approx((lines[2]["loss"] + lines[3]["loss"]) / 2, rel=1e-6)
    assert means[0]["rewards/margins"] == pytest.approx(lines[0]["rewards/margins"], abs=1e-7)


def test_more_than_allowed_stops_and_names_them_all(trainer_of, tmp_path):
    trainer = trainer_of("sft", {0: "loss", 2: "loss", 3: "loss"}, max_skipped_steps=2)
    found = {"what": "loss", "step": 4, "skipped": [1, 3]}
    with raises("training.not-finite", NonFiniteError) as error:
        trainer.train()
    assert {name: error.value.details[name] for name in found} == found
    assert "1, 3" in str(error.value.why) and "row-" in str(error.value.where)
    assert trainer.state.global_step == 3
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


class Killed(Exception):
    pass


class KillBefore(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resumed_is_bitwise_straight_and_counts_what_was_skipped_before(at, trainer_of):
    bad = {1: "loss", 4: "gradient"}
    straight = trainer_of("rpo", bad, "straight")
    straight.train()
    first = trainer_of("rpo", bad)
    first.add_callback(KillBefore(at))
    with pytest.raises(Killed):
        first.train()
    resumed = trainer_of("rpo", bad)
    noted: list[Any] = []
    resumed.step_guard.note = lambda skipped: noted.append(len(skipped))
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(resumed.model, straight.model)
    assert resumed.step_guard.skipped == straight.step_guard.skipped
    assert noted == ([2] if at == 5 else [1, 2])  # warnings in a checkpoint are logged again
    stingy = trainer_of("rpo", bad, max_skipped_steps=1)
    if at < 5:
        with raises("training.not-finite", NonFiniteError, step=5):
            stingy.train(
                resume_from_checkpoint=str(Path(stingy.args.output_dir) / f"checkpoint-{at}")
            )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_other_optimizers_and_weight_decay(optim, trainer_of):
    trainer = trainer_of("sft", {0: "loss", 3: "gradient"}, optim=optim, weight_decay=0.5)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    for step in (0, 3):
        for before, after in zip(watch.seen[step][0], watch.seen[step + 1][0], strict=True):
            assert torch.equal(before, after)


def test_the_step_zero_check_waits_for_the_first_step_that_is_taken(trainer_of):
    trainer = trainer_of("dpo", {0: "loss"})
    trainer.train()
    assert trainer.step_zero["loss"] == pytest.approx(trainer.step_zero["expected"], abs=1e-6)


def test_the_token_budget_is_one_step_too(trainer_of):
    trainer = trainer_of("rpo", {2: "loss"}, micro_batch_tokens=60)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert [one["step"] for one in trainer.step_guard.skipped] == [3]
    for before, after in zip(watch.seen[2][0], watch.seen[3][0], strict=True):
        assert torch.equal(before, after)


# --- invalid settings ---


def test_stop_and_skip_are_read(make_config) -> None:
    asked = ({}, {"on_nonfinite": "skip"}, {"on_nonfinite": "skip", "max_skipped_steps": 30})
    configs = [make_config("sft", **settings) for settings in asked]
    assert [config.allowed_skips for config in configs] == [0, 3, 30]
    assert [replace(config).allowed_skips for config in configs] == [0, 3, 30]


@pytest.mark.parametrize(
    "settings",
    [
        *({"on_nonfinite": text} for text in ("", "Stop", "skip(3)", "leave")),
        *({"on_nonfinite": "skip", "max_skipped_steps": n} for n in (0, -1)),
        {"max_skipped_steps": 3},  # it would have no effect
        {"on_nonfinite": "stop", "max_skipped_steps": 1},
    ],
)
def test_what_is_neither_or_would_not_act_is_refused(settings, make_config) -> None:
    with pytest.raises(RecipeError) as error:
        make_config("sft", **settings)
    assert error.value.details["settings"] == [min(settings)]
    unread = settings.get("on_nonfinite", "stop") == "stop"
    assert error.value.code == f"training.{'no-effect' if unread else 'invalid-value'}"


@pytest.mark.extras("deepspeed")
def test_what_cannot_be_skipped_is_refused(make_config, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with raises("training.unsupported-setting", RecipeError, settings=["on_nonfinite"]):
        make_config("sft", on_nonfinite="skip")


def test_a_loss_scaler_needs_the_clipping(make_config) -> None:
    config = make_config("sft", on_nonfinite="skip")
    config.fp16 = True
    (problem,) = config._problems()
    assert problem.setting == "max_grad_norm"
    config.max_grad_norm = 1.0
    assert config._problems() == []
