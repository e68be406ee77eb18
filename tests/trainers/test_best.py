"""The metric of the best checkpoint is one of the evaluation, and its direction is known before training."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rpo_trainer.errors import RecipeError
from rpo_trainer.trainers import RewardConfig, RewardTrainer
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import PAIRS, make_rows, rows_of
from tests.trainers.test_reward import REGRESSION, rated_rows
from tests.trainers.test_reward import start as reward_model

OF_TRANSFORMERS = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
EVERY_STEP = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "max_steps": 3,
}  # fmt: skip


def rows_for(kind: str) -> list[dict[str, Any]]:
    return make_rows(0, (1,) * 8) if kind == "sft" else rows_of(kind, PAIRS)


def evaluated(trainer: Any) -> set[str]:
    return {name.removeprefix("eval_") for name in trainer.evaluate()} - OF_TRANSFORMERS


@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
def test_the_names_are_those_of_an_evaluation(kind, start, make_trainer):
    rows = rows_for(kind)
    trainer = make_trainer(kind, copy.deepcopy(start), rows, eval_rows=rows)
    assert evaluated(trainer) - {"epoch"} == trainer.metric_names(trainer.args)


@pytest.mark.parametrize("objective", ["regression", "bradley_terry"])
def test_the_names_are_those_of_a_reward_models_evaluation(objective, tmp_path, tokenizer):
    ratings = objective == "regression"
    rows = rated_rows(0, 12) if ratings else rows_of("rpo", PAIRS)
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", **(REGRESSION if ratings else {})
    )
    model = reward_model() if ratings else make_model()
    trainer = RewardTrainer(model, args, rows, rows, processing_class=tokenizer)
    found = evaluated(trainer) - {"epoch"}
    undefined = {"accuracy"} if ratings else set()  # no prompt has several rated responses
    assert found == trainer.metric_names(args, trainer.eval_dataset) - undefined
    assert any(name.startswith("pearson/") for name in found)


def reward_trainer(metric: str, tokenizer: Any, folder: Any, rows: Any, **settings: Any) -> Any:
    args = RewardConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", metric_for_best_model=metric,
        **(EVERY_STEP | settings),
    )  # fmt: skip
    return RewardTrainer(make_model(), args, rows[:4], rows[4:], processing_class=tokenizer)


ONE = {"objective": "regression", "attributes": ["helpfulness"]}
RATED = rated_rows(0, 12)
RATED_ONCE = [{**row, "attributes": row["attributes"][:1]} for row in RATED]


@pytest.mark.parametrize(
    ("metric", "rows", "settings", "taken"),
    [
        ("spearman/gap", rows_of("rpo", PAIRS), {}, True),
        ("spearman/gap", rows_of("dpo", PAIRS), {}, False),
        ("accuracy", rows_of("dpo", PAIRS), {}, True),
        ("loss/regression", rows_of("dpo", PAIRS), {}, False),
        ("rmse/reward", RATED, REGRESSION, True),
        ("loss/foo", RATED, REGRESSION, False),
        ("rmse/helpfulness", RATED_ONCE, ONE, True),
        ("rmse/reward", RATED_ONCE, ONE, False),
    ],
)
def test_a_reward_models_metrics_depend_on_its_rows(
    metric, rows, settings, taken, tmp_path, tokenizer
):
    if taken:
        trainer = reward_trainer(metric, tokenizer, tmp_path, rows, **settings)
        trainer.train()
        assert trainer.state.best_metric is not None
        return
    with raises("training.unknown-metric", RecipeError) as caught:
        reward_trainer(metric, tokenizer, tmp_path, rows, **settings)
    assert caught.value.where == "metric_for_best_model"


def test_a_metric_that_is_not_defined_is_no_best(tmp_path, tokenizer, caplog):
    trainer = reward_trainer(
        "spearman/gap", tokenizer, tmp_path, rows_of("rpo", PAIRS), max_steps=1
    )
    trainer._determine_best_metric({"eval_loss": 1.0}, None)
    assert trainer.state.best_metric is None and "eval_spearman/gap" in caplog.text


@pytest.mark.parametrize(
    ("metric", "sets", "near"),
    [
        (None, ("a", "b"), "eval_a_loss"),
        ("loss", ("a", "b"), "eval_a_loss"),
        ("rewards/margins", ("a", "b"), "eval_a_rewards/margins"),
        ("eval_c_loss", ("a", "b"), "eval_a_loss"),
        ("eval_a_rewards/margin", ("a", "b"), "eval_a_rewards/margins"),
        ("accuracy", None, "eval_rewards/accuracies"),
        ("rewards/target_gap", None, "eval_rewards/"),
        ("loss/foo", None, "eval_loss/"),
        ("mem_cpu_alloc_delta", None, "eval_"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"load_best_model_at_end": False}], ids=["best", "noted"])
def test_a_metric_that_no_evaluation_has_is_refused_before_training(
    more, metric, sets, near, start, make_trainer
):
    if metric is None:
        more = {}  # otherwise no metric is needed
    rows = rows_for("dpo")
    with raises("training.unknown-metric", RecipeError) as caught:
        make_trainer(
            "dpo", copy.deepcopy(start), rows,
            eval_rows=rows if sets is None else dict.fromkeys(sets, rows),
            metric_for_best_model=metric, **(EVERY_STEP | more),
        )  # fmt: skip
    assert caught.value.where == "metric_for_best_model" and near in caught.value.fix
    assert bool(caught.value.why) == (sets is not None)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_needs_one_too(scheduler, start, make_trainer):
    rows = rows_for("dpo")
    settings = {"lr_scheduler_type": scheduler, "eval_strategy": "steps", "eval_steps": 1}
    with raises("training.unknown-metric", RecipeError, where="metric_for_best_model"):
        make_trainer(
            "dpo", copy.deepcopy(start), rows, eval_rows={"a": rows, "b": rows}, **settings
        )
    make_trainer(
        "dpo", copy.deepcopy(start), rows, eval_rows={"a": rows, "b": rows},
        metric_for_best_model="a_loss", **settings,
    ).train()  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("loss/sft", min), ("eval_a_rewards/margins", max), ("b_loss/preference", min),
        ("b_logps/chosen_falling", min),
    ],
)  # fmt: skip
def test_of_losses_the_lowest_is_the_best(metric, best, start, make_trainer):
    rows = rows_for("dpo")
    sets = {"a": rows[:4], "b": rows[4:]} if metric != "loss/sft" else rows
    trainer = make_trainer(
        "dpo", copy.deepcopy(start), rows, eval_rows=sets, metric_for_best_model=metric,
        sft_loss_weight=0.1, **EVERY_STEP,
    )  # fmt: skip
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = [line[name] for line in trainer.state.log_history if name in line]
    assert len(values) >= 3 and trainer.state.best_metric == best(values)
