"""`micro_batch_tokens`: other forwards, the same update; every rank runs the same number of them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.examples import Examples
from tests.small_models import make_model
from tests.trainers.plain import assert_bitwise_equal, assert_same_update, make_rows
from tests.trainers.test_resume import kill

# Ten rows in batches of four: epochs of three steps, the last of which has two rows.
KS = (2, 3, 2, 5, 2, 2, 3, 2, 4, 2)
STEPS = 7
LONG = 30  # below the longest example of either kind, which is processed alone


def rows_of(kind: str) -> list[dict[str, Any]]:
    return make_rows(0, (1,) * 10 if kind == "sft" else KS, spans=True, rewards=kind == "rpo")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    noisy = make_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return {"plain": make_model(), "noisy": noisy}


@pytest.fixture
def trainer_of(make_trainer, models):
    def make(kind: str, budget: int | None, model: str = "plain", **settings: Any) -> Any:
        return make_trainer(
            kind, copy.deepcopy(models[model]), rows_of(kind),
            **{
                "max_steps": STEPS, "global_batch_size": 4, "micro_batch_tokens": budget,
                "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0, **settings,
            },
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("kind", "layout"), [("sft", "shared"), ("rpo", "shared"), ("rpo", "padded")]
)
def test_the_update_is_that_of_fixed_micro_batches(kind, layout, trainer_of, models):
    settings: dict[str, Any] = {
        "layout": layout, "logging_strategy": "steps", "logging_steps": 3,
        **({} if kind == "sft" else {"sft_loss_weight": 0.1, "sft_reduction": "token_mean"}),
    }  # fmt: skip
    expected = trainer_of(kind, None, **settings)
    expected.train()
    for budget in (LONG, 90):
        trainer = trainer_of(kind, budget, **settings)
        trainer.train()
        assert trainer.state.global_step == STEPS
        assert_same_update(models["plain"], trainer.model, expected.model, 2e-3)
        for mine, other in zip(
            trainer.state.log_history[:-1], expected.state.log_history[:-1], strict=True
        ):
            # A reward that is 0 up to rounding may count as right or wrong, as in the step-0 line. And
            # an epoch's last step has fewer forwards, but is a full optimizer step.
            names = mine.keys() - {"rewards/accuracies", "logps/chosen_falling", "epoch"}
            assert mine.keys() == other.keys()
            assert {n: mine[n] for n in names} == pytest.approx(
                {n: other[n] for n in names}, rel=1e-3, abs=1e-4
            )


def test_the_number_of_forwards_follows_the_lengths(trainer_of, caplog):
    trainer = trainer_of("rpo", 35)
    with caplog.at_level(logging.WARNING, "rpo_trainer.trainers.loaders"):
        steps = list(trainer.get_train_dataloader())
    costs = dict(enumerate(trainer.train_dataset.costs(trainer.layout)))
    longer = [cost for cost in costs.values() if cost > 35]
    assert longer, "the case is not tried"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "rpo_trainer.trainers.loaders"]
    assert f"{len(longer)} of 10 examples are longer than micro_batch_tokens (35)" in line
    assert f"the longest has {max(longer)}" in line
    assert len(steps) == len(trainer.get_train_dataloader()) == 3
    assert len({len(step.micro_batches) for step in steps}) > 1
    seen = []
    for step in steps:
        assert step.counts[0] == sum(len(batch.ids) for batch in step.micro_batches)
        for batch in step.micro_batches:
            assert batch.model_inputs.input_ids.numel() <= 35 or len(batch.ids) == 1
            seen += batch.ids
    assert sorted(seen) == sorted(row["id"] for row in rows_of("rpo"))


def test_the_accounts_are_those_of_the_global_batch(trainer_of):
    trainer = trainer_of("sft", 40, global_batch_size=None, gradient_accumulation_steps=3)
    assert trainer.args.examples_per_step() == 6  # 2 per device × 3
    assert trainer.get_total_train_batch_size(trainer.args) == 6
    assert len(trainer.get_train_dataloader()) == 2


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_default_budget_is_the_largest_micro_batch_by_number(
    layout, trainer_of, models, monkeypatch, caplog
):
    """The same update with no more forwards and tokens in one of them, and one line about it."""
    settings: dict[str, Any] = {"layout": layout, "per_device_train_batch_size": 1}
    expected = trainer_of("rpo", None, **settings)
    by_number = [batch.num_tokens(padding=True) for batch in expected.get_train_dataloader()]
    expected.train()
    monkeypatch.setattr(BaseConfig, "by_tokens", property(lambda self: True))
    trainer = trainer_of("rpo", None, **settings)
    with caplog.at_level(logging.INFO, "rpo_trainer.trainers.loaders"):
        steps = list(trainer.get_train_dataloader())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert str(max(by_number)) in caplog.text  # a single example: the longest
    forwards = [b.num_tokens(padding=True) for step in steps for b in step.micro_batches]
    assert len(steps) == 3 and len(forwards) < len(by_number) == 10
    assert max(forwards) == max(by_number)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_same_update(models["plain"], trainer.model, expected.model, 2e-3)


@pytest.mark.parametrize(("kind", "model", "step"), [("sft", "noisy", 2), ("rpo", "plain", 4)])
def test_killed_and_resumed_is_bitwise_the_straight_run(kind, model, step, trainer_of, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    straight = trainer_of(kind, 60, model, output_dir=str(tmp_path / "straight"), **saving)
    straight.train()
    kill(trainer_of(kind, 60, model, **saving), step)  # within an epoch: two steps in, one step in
    resumed = trainer_of(kind, 60, model, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_bitwise_equal(resumed.model, straight.model)


@pytest.mark.parametrize(("before", "after"), [(None, 60), (60, None)])
def test_the_budget_may_change_on_resume(before, after, trainer_of, models, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    straight = trainer_of("rpo", None, output_dir=str(tmp_path / "straight"), **saving)
    straight.train()
    kill(trainer_of("rpo", before, **saving), 4)
    resumed = trainer_of("rpo", after, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_update(models["plain"], resumed.model, straight.model, 2e-3)


def test_shapes_are_the_tokens_of_a_forward(trainer_of):
    import datasets

    rows = rows_of("dpo")
    for examples in (Examples(rows), Examples(datasets.Dataset.from_list(rows))):
        for layout in ("shared", "packed"):
            assert examples.shapes(layout).tolist() == [[c, 1] for c in examples.costs(layout)]
        assert examples.shapes("padded").tolist() == [
            [len(row["response_ids"]), len(row["prompt_ids"]) + max(map(len, row["response_ids"]))]
            for row in rows
        ]
