"""Early warnings: each from logs with its condition, none from a healthy run, none twice."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.trainers import DPOConfig, RPOConfig
from rpo_trainer.trainers.early_warnings import EXAMPLES, EarlyWarnings, find_warnings
from tests.trainers.plain import PAIRS, rows_of

HEALTHY = {
    "loss": 0.5, "loss/preference": 0.5, "loss/sft": 40.0, "rewards/margins": 1.5,
    "rewards/accuracies": 0.8, "rewards/target_gap": 2.0, "rewards/target_saturated": 0.1,
    "logps/chosen": -41.0, "logps/chosen_delta": -1.0, "grad_norm": 1.0,
}  # fmt: skip


def config(kind: str = "rpo", **changes: Any) -> Any:
    common = {"loss_type": "rpo_bwd_kl" if kind == "rpo" else "dpo", "beta": 0.1}
    common |= {"sft_loss_weight": 0.0, "reward_scale": 2.0, "examples_per_step": lambda: 32}
    return SimpleNamespace(**{**common, **changes})


def state(step: int, history: list[Any] | None = None, first_rank: bool = True) -> Any:
    return SimpleNamespace(
        global_step=step, log_history=history or [], is_world_process_zero=first_rank
    )


def names(args: Any, **changes: Any) -> list[str]:
    return [warning.name for warning in find_warnings({**HEALTHY, **changes}, args)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logps/chosen_delta": -3.5}, []),  # the reference's are -37.5: 10 % are 3.75
        ({"logps/chosen_delta": -6.0}, ["chosen_falling"]),
        ({"logps/chosen": -5.0, "logps/chosen_delta": -1.9}, []),  # short responses: 2 nats
        ({"logps/chosen": -5.0, "logps/chosen_delta": -2.1}, ["chosen_falling"]),
        ({"rewards/target_saturated": 0.5}, []),
        ({"rewards/target_saturated": 0.51}, ["targets_saturated"]),
        ({"rewards/margins": 10.0}, []),
        ({"rewards/margins": 10.1}, ["margins_exploding"]),
        ({"rewards/margins": 10.1, "rewards/target_gap": 4.0}, []),  # it is requested
        ({"rewards/accuracies": 1.0, "logps/chosen_delta": 0.5}, []),
        ({"rewards/accuracies": 0.98}, []),
        ({"rewards/accuracies": 0.99}, ["chosen_unlearned"]),
        ({"rewards/accuracies": 1.0, "logps/chosen": -60.0}, []),  # 1 of 59 nats is noise
    ],
)
def test_thresholds(changes: dict[str, float], expected: list[str]) -> None:
    assert names(config(), **changes) == expected


def test_a_healthy_run_gets_none() -> None:
    assert names(config()) == []
    only = {name: HEALTHY[name] for name in ("loss", "rewards/margins")}
    assert list(find_warnings(only, config("dpo"))) == []  # missing metrics are not judged


def test_squared_losses_have_no_saturated_targets() -> None:
    args = config(loss_type="rpo_sq")
    assert names(args, **{"rewards/target_saturated": 1.0}) == []


def test_what_to_try_names_recipe_keys_and_their_values() -> None:
    bad = {**HEALTHY, "logps/chosen_delta": -20.0, "rewards/margins": 30.0, "logps/chosen": -60.0}
    bad |= {"rewards/accuracies": 1.0, "rewards/target_saturated": 0.9}
    falling, saturated, exploding, unlearned = find_warnings(bad, config(sft_loss_weight=0.005))
    assert "20 nats per response below the reference model's (50%)" in falling.text
    for warning in (falling, unlearned):
        assert "raise sft_loss_weight (now 0.005), raise beta (now 0.1)" in warning.advice
    assert "near 0 or 1 for 90% of the examples" in saturated.text
    assert "lower reward_scale (now 2)" in saturated.advice
    assert "the implicit reward gap is 30 (target: 2)" in exploding.text
    assert "lower learning_rate, raise beta (now 0.1)" in exploding.advice
    assert "set sft_loss_weight (now 0)" in next(find_warnings(bad, config())).advice
    fields = set(RPOConfig.__dataclass_fields__) | set(DPOConfig.__dataclass_fields__)
    assert {"sft_loss_weight", "beta", "reward_scale", "learning_rate", "max_steps"} <= fields


def test_each_is_reported_once_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    noted: list[list[dict[str, Any]]] = []
    callback = EarlyWarnings(lambda found: noted.append(list(found)))
    callback.on_train_begin(config(), state(0), None)
    for step in (2, 4, 6, 8):
        bad = {**HEALTHY, "rewards/margins": 50.0 if step > 4 else 1.0}
        callback.on_log(config(), state(step), None, logs=bad)
    assert [message.split(": ")[0] for message in caplog.messages] == ["step 6"]
    assert caplog.records[0].levelno == logging.WARNING
    assert "\n" not in caplog.messages[0] and "Try: lower learning_rate" in caplog.messages[0]
    assert noted[0] == [] and len(noted) == 2
    assert [(w["name"], w["step"]) for w in noted[1]] == [("margins_exploding", 6)]


def test_a_few_examples_are_not_judged_alone() -> None:
    callback = EarlyWarnings()
    args = config(examples_per_step=lambda: EXAMPLES // 4)
    margins = {1: 100.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 60.0}
    callback.on_train_begin(args, state(0), None)
    for step, margin in margins.items():
        callback.on_log(args, state(step), None, logs={**HEALTHY, "rewards/margins": margin})
        # The mean over the last four lines: 25 at step 4, 0 at step 5, 15 at step 6.
        assert [w["step"] for w in callback.found] == ([4] if step >= 4 else [])


def test_evaluations_and_the_last_line_are_not_judged() -> None:
    callback = EarlyWarnings()
    callback.on_train_begin(config(), state(0), None)
    callback.on_log(config(), state(9), None, logs={"eval_rewards/margins": 99.0})
    callback.on_log(config(), state(9), None, logs={"train_loss": 1.0, "rewards/margins": 99.0})
    callback.on_log(config(), state(9), None, logs=None)
    assert callback.found == []


def test_a_resumed_run_says_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    bad = {**HEALTHY, "rewards/margins": 50.0}
    noted: list[Any] = []
    callback = EarlyWarnings(noted.append)
    history = [{"step": 2, **bad}, {"step": 2, "eval_loss": 1.0}, {"step": 4, **bad}]
    callback.on_train_begin(config(), state(4, history), None)
    assert caplog.messages == []
    assert [w["step"] for w in noted[-1]] == [2]
    callback.on_log(config(), state(6), None, logs=bad)
    assert caplog.messages == []
    callback.on_log(config(), state(8), None, logs={**bad, "logps/chosen_delta": -30.0})
    assert [w["name"] for w in callback.found] == ["margins_exploding", "chosen_falling"]


def test_other_ranks_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings()
    bad = {**HEALTHY, "rewards/margins": 50.0}
    callback.on_log(config(), state(9, first_rank=False), None, logs=bad)
    assert caplog.messages == [] and len(callback.found) == 1


def test_a_policy_that_runs_away_is_noticed_by_the_trainer_itself(
    start: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), learning_rate=0.2, beta=8.0,
        max_grad_norm=1.0, global_batch_size=8, max_steps=16, logging_strategy="steps",
        logging_steps=8,
    )  # fmt: skip
    trainer.train()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyWarnings)]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged[-1]["rewards/accuracies"] == 1.0 and logged[-1]["rewards/margins"] > 10
    assert "margins_exploding" in {warning["name"] for warning in callback.found}
    said = [r for r in caplog.records if r.name == "rpo_trainer.trainers.early_warnings"]
    assert {r.levelname for r in said} == {"WARNING"} and len(said) == len(callback.found)


def test_one_of_your_own_takes_the_place_of_the_trainers(start: Any, make_trainer: Any) -> None:
    own = EarlyWarnings()
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows_of("dpo", PAIRS), callbacks=[own], max_steps=1,
        global_batch_size=4,
    )  # fmt: skip
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyWarnings)]
    assert found == [own]
