"""A stage's arguments from its recipe, and its outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.outputs import output_fingerprint
from rpo_trainer.errors import Problems, RecipeError
from rpo_trainer.recipe import ModelSpec, Stage, expand_stages
from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.stages.settings import arithmetic, lora_config, training_config
from tests.chain import tiny
from tests.raising import codes_of, raises

# Fields that the trainer's config does not have under the same name, and what reads them.
READ_ELSEWHERE = {
    "name": "folder", "kind": "class", "init": "chain", "reference": "chain", "data": "data",
    "micro_batch_size": "per_device_train_batch_size", "seed": "seed", "peft": "lora_config",
    "training_args": "all", "eval": "chain", "repeat": "expand_stages",
    "gradient_checkpointing": "activation_checkpointing", "save_dtype": "chain",
}  # fmt: skip


def stage_with(folder: Path, name: str, **fields: Any) -> Stage:
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, name).update(fields)
    stages = expand_stages(tiny.load(folder, recipe).recipe)
    return next(stage for stage in stages if stage.name.startswith(name))


def config(folder: Path, name: str, dtype: str = "float32", **fields: Any) -> Any:
    recipe = tiny.load(folder).recipe
    return training_config(
        stage_with(folder, name, **fields),
        recipe.model.model_copy(update={"dtype": dtype}),
        seed=5,
        folder=folder / "run" / name,
        run_dir=folder / "run",
    )


OTHER: dict[str, Any] = {
    "max_length": 33, "truncation": "truncate", "global_batch_size": 24, "micro_batch_size": 4,
    "micro_batch_tokens": 96,
    "max_steps": 9, "learning_rate": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    "weight_decay": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "max_grad_norm": 3.0,
    "optim": "sgd", "logging_steps": 4, "save_steps": 7, "save_total_limit": 5,
    "beta": 0.125, "loss_type": "rpo_sqloo", "sft_loss_weight": 0.5,
    "sft_reduction": "token_mean", "average_logps": True, "step0_check": False,
    "disable_dropout": False, "reward_scale": 2.0, "on_nonfinite": "skip", "max_skipped_steps": 2,
    "router_aux_loss_coef": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(set(OTHER) - set(READ_ELSEWHERE)))
def test_every_field_reaches_the_trainers_config(field: str, tmp_path: Path) -> None:
    beside = {
        "warmup_steps": {"lr_scheduler_type": "linear"},
        "max_skipped_steps": {"on_nonfinite": "skip"},
    }
    more = beside.get(field, {})
    value = getattr(config(tmp_path, "rpo", **{field: OTHER[field]}, **more), field)
    assert value == OTHER[field]
    assert value != getattr(config(tmp_path, "rpo"), field)


def test_no_field_is_forgotten() -> None:
    own = {"label_smoothing", "num_train_epochs", "eval_steps", "report_to"}  # tested below
    fields = {name for kind in STAGE_KINDS.values() for name in kind.model_fields}
    assert fields == set(OTHER) | set(READ_ELSEWHERE) | own | set(REWARD)


REWARD: dict[str, Any] = {
    "objective": "regression", "attributes": ["wit", "depth"], "rating_range": [1, 5],
    "reward_weights": {"wit": 1.0, "depth": 0.5}, "margin_scale": 0.5,
}  # fmt: skip


def test_every_field_of_a_reward_stage_reaches_the_config(tmp_path: Path) -> None:
    rated = {name: value for name, value in REWARD.items() if name != "margin_scale"}
    base = {
        "kind": "reward",
        "max_steps": 1,
        "data": {"train": [{"path": "r"}], "eval_fraction": 0.5},
    }
    recipe = tiny.tiny_recipe()
    recipe["stages"] = [
        {**base, "name": "rated", **rated, "eval_steps": 2},
        {**base, "name": "pairs", "objective": "bradley_terry", "margin_scale": 0.5},
    ]
    loaded = tiny.load(tmp_path, recipe)
    made = [
        training_config(
            stage, loaded.recipe.model, seed=5, folder=tmp_path / stage.name, run_dir=tmp_path
        )
        for stage in expand_stages(loaded.recipe)
    ]
    assert {name: getattr(made[0], name) for name in rated} == rated
    assert (made[0].eval_strategy, made[0].eval_steps) == ("steps", 2)
    assert (made[1].objective, made[1].margin_scale) == ("bradley_terry", 0.5)


def test_fields_with_other_names_or_conditions(tmp_path: Path) -> None:
    made = config(tmp_path, "rpo", micro_batch_size=4, global_batch_size=12)
    assert made.per_device_train_batch_size == made.per_device_eval_batch_size == 4
    assert made.gradient_accumulation_steps == 3
    assert made.seed == 5
    assert made.reference_cache_dir == str(tmp_path / "run" / "reference-cache")
    assert config(tmp_path, "dpo", label_smoothing=0.25).label_smoothing == 0.25
    epochs = config(tmp_path, "code", max_steps=None, num_train_epochs=2.5)
    assert (epochs.num_train_epochs, epochs.max_steps) == (2.5, -1)
    assert config(tmp_path, "code", save_steps=None).save_strategy == "no"
    assert config(tmp_path, "code", eval_steps=3).eval_steps == 3
    assert config(tmp_path, "code", eval_steps=3).eval_strategy == "steps"
    assert config(tmp_path, "general", eval_steps=3).eval_strategy == "no"  # nothing held out
    more = config(
        tmp_path, "code", training_args={"dataloader_num_workers": 1, "adam_epsilon": 1e-6}
    )
    assert (more.dataloader_num_workers, more.adam_epsilon) == (1, 1e-6)


def test_checkpointing_is_asked_for_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not config(tmp_path, "code").gradient_checkpointing
        assert config(tmp_path, "code", gradient_checkpointing=True).gradient_checkpointing


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [("float32", False, False), ("bfloat16", True, False), ("auto", False, False)],
)
def test_dtype_is_the_arithmetic(dtype: str, bf16: bool, fp16: bool, tmp_path: Path) -> None:
    made = config(tmp_path, "code", dtype)
    assert (made.bf16, made.fp16) == (bf16, fp16)


def test_auto_is_bfloat16_where_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_recipe()["model"]
    spec = ModelSpec.model_validate({**model, "dtype": "auto"})
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has: has)
        assert arithmetic(spec) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        ({"learning_rte": 1}, "recipe.unknown-training-argument", "learning_rte"),
        ({"adam_epsilon": "${NOT_SET_ANYWHERE}"}, "recipe.unset-variable", " NOT_SET_ANYWHERE"),
    ],
)
def test_wrong_training_arguments_are_named(
    arguments: dict[str, Any], code: str, shown: str, tmp_path: Path
) -> None:
    with pytest.raises((Problems, RecipeError)) as error:
        config(tmp_path, "code", training_args=arguments)
    assert shown in str(error.value) and "stages.code.training_args" in str(error.value)
    assert code in codes_of(error.value)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"optim": "adamw_tor"}, "stages.code.optim: "),
        ({"lr_scheduler_type": "flat"}, "stages.code.lr_scheduler_type: "),
        ({"report_to": "paper"}, "stages.code.report_to: "),
    ],
)
def test_names_that_transformers_does_not_know(
    fields: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises((Problems, RecipeError)) as error:
        config(tmp_path, "code", **fields)
    assert str(error.value).startswith(where)
    assert str(next(iter(fields.values()))) in str(error.value)


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback, integrations

    class Absent(TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("Tracker requires x to be installed. Run `pip install x`.")

    classes = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(classes, "tensorboard", TrainerCallback)
    assert config(tmp_path, "code", report_to="tensorboard").report_to == ["tensorboard"]
    assert config(tmp_path, "code").report_to == []
    monkeypatch.setitem(classes, "wandb", Absent)
    where = "stages.code.report_to"
    with raises("recipe.tracker-cannot-start", RecipeError, where=where) as error:
        config(tmp_path, "code", report_to=["tensorboard", "wandb"])
    assert "`pip install x`" in error.value.what and error.value.fix


def test_an_adapter_from_a_recipe(tmp_path: Path) -> None:
    assert lora_config(stage_with(tmp_path, "code")) is None
    made = lora_config(stage_with(tmp_path, "code", peft={"r": 3, "target_modules": ["q_proj"]}))
    assert made is not None and made.r == 3 and made.task_type == "CAUSAL_LM"
    with pytest.raises(RecipeError, match="rank") as error:
        lora_config(stage_with(tmp_path, "code", peft={"rank": 3}))
    assert error.value.where == "stages.code.peft.rank"


def test_the_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    files = {
        "model-2.safetensors": {"size": 1, "xxh3_128": "b" * 32},
        "model-1.safetensors": {"size": 1, "xxh3_128": "a" * 32},
        "config.json": {"size": 1, "xxh3_128": "c" * 32},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    assert output_fingerprint(tmp_path) == "a" * 16 + "+" + "b" * 16


def test_evaluation_within_training_is_not_done_again(tmp_path: Path) -> None:
    recipe = tiny.changed(tiny.tiny_recipe(), "code.eval_steps", 3)
    recipe["stages"] = recipe["stages"][:1]
    run_dir = tiny.run(tmp_path, recipe)
    steps = [step for step, evaluated in tiny.metric_steps(run_dir, "code") if evaluated]
    assert steps == [0, 3, 6]
    record = tiny.records(run_dir)["code"]
    lines = [m for m in tiny.metrics(run_dir) if m["step"] == 6 and "eval_loss" in m]
    assert record["eval_after"]["eval_loss"] == lines[0]["eval_loss"]


def test_the_evaluation_is_of_the_weights_that_are_the_output(tmp_path: Path) -> None:
    """The best checkpoint, which is not the last one, is loaded at the end of training."""
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0] |= {
        "eval_steps": 1, "learning_rate": 1.0,
        "training_args": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    }  # fmt: skip
    run_dir = tiny.run(tmp_path, recipe)
    lines = [m for m in tiny.metrics(run_dir) if "eval_loss" in m]
    steps = [
        *range(tiny.SFT_STEPS + 1),
        tiny.SFT_STEPS,
    ]  # the last line belongs to the loaded weights
    assert [line["step"] for line in lines] == steps
    losses = [line["eval_loss"] for line in lines]
    assert min(losses[1:-1]) < losses[-2]
    after = tiny.records(run_dir)["code"]["eval_after"]["eval_loss"]
    assert after == losses[-1] == pytest.approx(min(losses[1:-1]), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("save_only_model", True),
        ("resume_from_checkpoint", "somewhere"),
        ("ignore_data_skip", True),
        ("bf16_full_eval", True),
        ("label_smoothing_factor", 0.1),
        ("train_sampling_strategy", "group_by_length"),
        ("accelerator_config", {"split_batches": True}),
        ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 2}}),
    ],
)
def test_training_args_that_could_not_act_are_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, Problems)) as caught:
        config(tmp_path, "code", training_args={name: value})
    assert name in str(caught.value) and "stages.code" in str(caught.value)


def test_training_args_say_the_order_of_the_data(tmp_path: Path) -> None:
    assert config(tmp_path, "code").shuffle is True
    for order in ({"shuffle": False}, {"train_sampling_strategy": "sequential"}):
        made = config(tmp_path, "code", training_args=order)
        assert (made.shuffle, made.train_sampling_strategy) == (False, "sequential")


def test_the_configs_defaults_do_not_reach_a_recipe(tmp_path: Path) -> None:
    made = config(tmp_path, "code")
    assert made.gradient_checkpointing is False and made.bf16 is False
    assert not made.checkpointing_is_default and not made.compared_with_trl
