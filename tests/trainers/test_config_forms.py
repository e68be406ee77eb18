"""Configs from a command line, and copies of configs: the same settings in every form."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from rpo_trainer.errors import RecipeError
from rpo_trainer.trainers import DPOConfig, RewardConfig, RPOConfig, SFTConfig, SFTTrainer
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import make_rows

CONFIGS = [SFTConfig, DPOConfig, RPOConfig, RewardConfig]
CPU = {"use_cpu": True, "report_to": "none"}
FSDP = {"version": 2, "activation_checkpointing": True}

# As on a command line, and in Python
WRITTEN: list[tuple[type, str, dict[str, Any]]] = [
    (SFTConfig, "--shuffle --bf16 --gradient_checkpointing", {
        "shuffle": True, "bf16": True, "gradient_checkpointing": True}),
    (SFTConfig, "--shuffle false --truncation truncate", {"shuffle": False, "truncation": "truncate"}),
    (SFTConfig, '--lr_scheduler_kwargs {"num_cycles":2}', {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    (DPOConfig, "--beta 0.3 --no_disable_dropout", {"beta": 0.3, "disable_dropout": False}),
    (RPOConfig, "--reward-scale 2 --micro_batch_tokens 99", {"reward_scale": 2, "micro_batch_tokens": 99}),
    (RewardConfig, "--objective regression --attributes help length --rating_range 0 4", {
        "objective": "regression", "attributes": ["help", "length"], "rating_range": [0.0, 4.0]}),
    (RewardConfig, '--objective regression --attributes a b --reward_weights {"a":0.5,"b":1}', {
        "objective": "regression", "attributes": ["a", "b"], "reward_weights": {"a": 0.5, "b": 1}}),
]  # fmt: skip


def settings_of(config: Any) -> dict[str, Any]:
    unlike = ("derived", "hub_token")  # `to_dict` hides tokens
    return {name: value for name, value in config.to_dict().items() if name not in unlike}


@pytest.mark.parametrize(("config", "line", "settings"), WRITTEN, ids=lambda value: str(value)[:40])
def test_a_command_line_makes_the_same_config(config, line, settings, tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    parser = HfArgumentParser(config)
    (parsed,) = parser.parse_args_into_dataclasses(
        [*given, *line.split()], look_for_args_file=False
    )
    assert settings_of(parsed) == settings_of(config(str(tmp_path), **CPU, **settings))
    (plain,) = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    assert settings_of(plain) == settings_of(config(str(tmp_path), **CPU))
    assert plain.checkpointing_is_default
    assert "--max_length" in parser.format_help()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_parser_of_trl_takes_our_configs(config, tmp_path):
    trl = pytest.importorskip("trl")
    parser = trl.TrlParser((trl.ScriptArguments, config, trl.ModelConfig))
    line = f"--dataset_name x --output_dir {tmp_path} --use_cpu --report_to none --max_length 99"
    _, parsed, _ = parser.parse_args_and_config(line.split())
    assert parsed.max_length == 99 and parsed.checkpointing_is_default


# --- copies ---

# What a config was created with, what a copy changes, and the arguments that would create the copy
CHANGED: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    (SFTConfig, {}, {"train_sampling_strategy": "sequential"}),
    (SFTConfig, {"shuffle": False}, {"shuffle": True}),
    (SFTConfig, {"train_sampling_strategy": "sequential"}, {"train_sampling_strategy": "random"}),
    (SFTConfig, {}, {"learning_rate": 1e-3}),
    (SFTConfig, {}, {"gradient_checkpointing": False}),
    (SFTConfig, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    (SFTConfig, {"gradient_checkpointing_kwargs": {"x": 1}}, {"gradient_checkpointing_kwargs": {"x": 2}}),
    (SFTConfig, {}, {"fsdp": True, "fsdp_config": FSDP}),
    (SFTConfig, {"global_batch_size": 32}, {"per_device_train_batch_size": 4}),
    (SFTConfig, {"global_batch_size": 32}, {"global_batch_size": 64}),
    (SFTConfig, {"global_batch_size": 32}, {"micro_batch_tokens": 100}),
    (SFTConfig, {"micro_batch_tokens": 100}, {"per_device_train_batch_size": 4}),
    (DPOConfig, {"metric_for_best_model": "loss"}, {"metric_for_best_model": "rewards/margins"}),
    (DPOConfig, {"eval_strategy": "steps"}, {"logging_steps": 7}),
]  # fmt: skip

COPIES: dict[str, Callable[..., Any]] = {
    "replace": dataclasses.replace,
    "to_dict": lambda config, **changes: type(config)(**{**config.to_dict(), **changes}),
    "JSON": lambda config, **changes: type(config)(
        **{**json.loads(config.to_json_string()), **changes}
    ),
    "replaced twice": lambda config, **changes: dataclasses.replace(
        dataclasses.replace(config), **changes
    ),
    "pickled": lambda config, **changes: dataclasses.replace(
        pickle.loads(pickle.dumps(copy.deepcopy(config))), **changes
    ),
}


@pytest.mark.parametrize("form", COPIES)
@pytest.mark.parametrize(
    ("config", "settings", "changes"), CHANGED, ids=lambda value: str(value)[:60]
)
def test_a_changed_copy_is_the_config_that_is_made_so(config, settings, changes, form, tmp_path):
    made = config(str(tmp_path), **CPU, **settings)
    changed = COPIES[form](made, **changes)
    wanted = config(str(tmp_path), **CPU, **{**settings, **changes})
    assert settings_of(changed) == settings_of(wanted)
    assert changed.checkpointing_is_default == wanted.checkpointing_is_default


def test_what_was_set_is_set_in_a_copy_too(tmp_path):
    made = SFTConfig(str(tmp_path), **CPU, shuffle=True)
    with raises("training.conflicting-settings", RecipeError):
        dataclasses.replace(made, train_sampling_strategy="sequential")
    made = SFTConfig(str(tmp_path), **CPU, gradient_checkpointing=True)
    assert not dataclasses.replace(made).checkpointing_is_default


def test_the_default_of_checkpointing_is_found_for_each_model(tmp_path, tokenizer):
    unable = make_model()
    for module in (unable, unable.model):
        module.__class__ = type(
            "Unable", (type(module),), {"supports_gradient_checkpointing": False}
        )
    args = SFTConfig(str(tmp_path), **CPU, save_strategy="no", max_steps=1)
    for model, on in ((make_model(), True), (unable, False), (make_model(), True)):
        for each in (args, dataclasses.replace(args)):
            SFTTrainer(model, each, make_rows(0, (1,) * 4), processing_class=tokenizer)
            assert each.gradient_checkpointing is on and each.checkpointing_is_default


# --- settings that are JSON, or name a JSON file ---


@pytest.mark.parametrize("form", ["dict", "text", "file"])
def test_checkpointing_is_not_a_default_next_to_that_of_fsdp(form, tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(FSDP))
    forms: dict[str, Any] = {"dict": dict(FSDP), "text": json.dumps(FSDP), "file": str(path)}
    made = SFTConfig(str(tmp_path), **CPU, fsdp=True, fsdp_config=forms[form])
    assert made.gradient_checkpointing is False and made.fsdp_config["activation_checkpointing"]
    with raises("training.conflicting-settings", RecipeError, settings=["gradient_checkpointing"]):
        SFTConfig(
            str(tmp_path), **CPU, fsdp=True, fsdp_config=forms[form], gradient_checkpointing=True
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, '{"x"') for name in SFTConfig._VALID_DICT_FIELDS if name != "derived"),
        ("fsdp_config", "no/such/file.json"),
        ("accelerator_config", '{"bogus": 1}'),
        ("accelerator_config", "LIST"),
        ("fsdp_config", "LIST"),
        ("lr_scheduler_kwargs", "num_cycles"),
        ("gradient_checkpointing_kwargs", "use_reentrant=False"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(name: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "LIST").write_text("[1]")
    with pytest.raises(RecipeError) as caught:
        SFTConfig(
            str(tmp_path), **CPU, **{name: str(tmp_path / value) if value == "LIST" else value}
        )
    assert caught.value.where == name


def test_weights_of_a_reward_model_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RecipeError) as caught:
        RewardConfig(str(tmp_path), **CPU, reward_weights='{"a"')
    assert caught.value.where == "reward_weights"
