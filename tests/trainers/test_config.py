"""What the configs refuse, and what they derive."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import pydoc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from rpo_trainer.errors import RecipeError
from rpo_trainer.trainers import DPOConfig, RewardConfig, RPOConfig, SFTConfig, base_config
from rpo_trainer.trainers.engine import waits_each_micro_batch
from rpo_trainer.trainers.unknown_arguments import ELSEWHERE
from tests.raising import raises

INVALID, UNSUPPORTED = "training.invalid-value", "training.unsupported-setting"
# Config, settings, code, the named setting, and a word of the message
REFUSED: list[tuple[type, dict[str, Any], str, str, str]] = [
    (SFTConfig, {"truncation": "keep_end"}, INVALID, "truncation", "'keep_end'"),
    (SFTConfig, {"layout": "dense"}, INVALID, "layout", "shared, packed, padded, single"),
    (SFTConfig, {"max_length": 1}, INVALID, "max_length", "1"),
    (SFTConfig, {"logits_chunk_bytes": 0}, INVALID, "logits_chunk_bytes", "0"),
    (SFTConfig, {"micro_batch_tokens": -1}, INVALID, "micro_batch_tokens", "-1"),
    (SFTConfig, {"micro_batch_tokens": 9, "global_batch_size": 0}, INVALID, "global_batch_size", "0"),
    (SFTConfig, {"remove_unused_columns": True}, UNSUPPORTED, "remove_unused_columns", "True"),
    (SFTConfig, {"auto_find_batch_size": True}, UNSUPPORTED, "auto_find_batch_size", "micro_batch_tokens"),
    (DPOConfig, {"loss_type": "rpo_bwd_kl"}, INVALID, "loss_type", "dpo, ipo"),
    (DPOConfig, {"loss_type": ["sigmoid", "sft"]}, INVALID, "loss_type", "sft_loss_weight"),
    (RPOConfig, {"loss_type": "dpo"}, INVALID, "loss_type", "rpo_bwd_kl, rpo_fwd_kl, rpo_sq, rpo_sqloo"),
    (DPOConfig, {"beta": 0.0}, INVALID, "beta", "0.0"),
    (DPOConfig, {"beta": math.nan}, INVALID, "beta", "nan"),
    (DPOConfig, {"beta": math.inf}, INVALID, "beta", "inf"),
    (DPOConfig, {"sft_loss_weight": -1e-5}, INVALID, "sft_loss_weight", "-1e-05"),
    (RPOConfig, {"sft_loss_weight": math.inf}, INVALID, "sft_loss_weight", "inf"),
    (DPOConfig, {"sft_reduction": "mean"}, INVALID, "sft_reduction", "'mean'"),
    (RPOConfig, {"reference_batch_tokens": 0}, INVALID, "reference_batch_tokens", "0"),
    (DPOConfig, {"label_smoothing": 0.5}, INVALID, "label_smoothing", "[0, 0.5)"),
    (DPOConfig, {"label_smoothing": -0.1}, INVALID, "label_smoothing", "-0.1"),
    (
        DPOConfig, {"label_smoothing": 0.1, "loss_type": "ipo"}, "training.no-effect",
        "label_smoothing", "ipo",
    ),
    (RPOConfig, {"reward_scale": 0.0}, INVALID, "reward_scale", "0.0"),
    (RPOConfig, {"reward_scale": "auto"}, INVALID, "reward_scale", "rpo-trainer calibrate"),
    (DPOConfig, {"rpo_alpha": 0.1}, UNSUPPORTED, "rpo_alpha", "sft_loss_weight"),
    (RPOConfig, {"rpo_alpha": 1.0}, UNSUPPORTED, "rpo_alpha", "sft_loss_weight"),
]  # fmt: skip


def make(config: type, tmp_path: Path, **settings: Any) -> Any:
    return config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(("config", "settings", "code", "named", "word"), REFUSED)
def test_what_does_not_fit_is_refused(config, settings, code, named, word, tmp_path):
    fields = {"where": config.__name__, "exit_code": 2, "codes": [code], "settings": [named]}
    with raises(code, RecipeError, **fields) as caught:
        make(config, tmp_path, **settings)
    assert named in caught.value.what and word in caught.value.what


def test_all_that_does_not_fit_is_reported_together(tmp_path):
    wrong = ["beta", "sft_reduction", "reward_scale"]
    with raises(INVALID, RecipeError, settings=wrong, codes=[INVALID] * 3):
        make(RPOConfig, tmp_path, beta=-1.0, sft_reduction="none", reward_scale=-2.0)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (
            SFTConfig,
            "logits_chunk_bytes (int, 536870912): Maximum size of a tile of logits, in bytes.",
        ),
        (DPOConfig, "label_smoothing (float, 0.0): Assumed fraction of wrong labels: cDPO"),
        (DPOConfig, "loss_type (str, 'dpo'): `dpo`: −log σ of the implicit reward gap"),
        (RPOConfig, "reward_scale (float, 1.0): η: scale of the rewards."),
        (RPOConfig, "loss_type (str, 'rpo_bwd_kl'): `rpo_bwd_kl`: KL(softmax of"),
        (RewardConfig, "objective (str, 'bradley_terry'): `bradley_terry` (pairs) or"),
        (RewardConfig, "learning_rate (float, 0.0001): Peak learning rate."),
    ],
)
def test_help_shows_every_field_of_ours(config, shown):
    text = pydoc.plain(pydoc.render_doc(config))
    assert shown in text
    listed = [line for line in config.__doc__.splitlines() if re.match(r"    \w+ \(.*\): ", line)]
    foreign = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    ours = [f.name for f in dataclasses.fields(config) if foreign.get(f.name) is not f]
    assert [line.split()[0] for line in listed] == ours and "max_length" in ours


def test_accumulation_follows_from_the_global_batch(tmp_path):
    args = make(SFTConfig, tmp_path, per_device_train_batch_size=4, global_batch_size=32)
    assert args.gradient_accumulation_steps == 8
    args = make(SFTConfig, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert args.gradient_accumulation_steps == 3


def test_with_a_token_budget_any_number_of_examples_is_one_batch_to_the_loop(tmp_path):
    args = make(SFTConfig, tmp_path, micro_batch_tokens=64, global_batch_size=30)
    assert (args.gradient_accumulation_steps, args.examples_per_step()) == (1, 30)
    args = make(
        SFTConfig, tmp_path, micro_batch_tokens=64, per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    assert (args.gradient_accumulation_steps, args.examples_per_step()) == (1, 12)
    again = make(
        SFTConfig, tmp_path, micro_batch_tokens=64, per_device_train_batch_size=4,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        global_batch_size=args.global_batch_size,
    )  # fmt: skip
    assert again.examples_per_step() == 12  # unchanged if created again from its own fields


@pytest.fixture
def sharded(monkeypatch):
    """Two ranks of an engine whose ranks wait for each other in each micro-batch."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(base_config, "waits_each_micro_batch", lambda args: True)


@pytest.mark.parametrize(
    ("settings", "examples", "by_number"),
    [
        ({}, 8, 1),
        ({"gradient_accumulation_steps": 3}, 24, 3),
        ({"global_batch_size": 16}, 16, 2),
        ({"global_batch_size": 16, "gradient_accumulation_steps": 2}, 16, 2),
    ],
)
def test_a_budget_by_default_keeps_the_global_batch(
    settings, examples, by_number, sharded, tmp_path
):
    args = make(SFTConfig, tmp_path, per_device_train_batch_size=4, **settings)
    for config in (args, dataclasses.replace(args)):
        assert config.by_tokens and config.micro_batch_tokens is None
        assert (config.gradient_accumulation_steps, config.examples_per_step()) == (1, examples)
        assert config.accumulation_by_number == by_number  # of the launcher, too
    fixed = make(
        SFTConfig, tmp_path, per_device_train_batch_size=4, micro_batch_tokens=0, **settings
    )
    assert not fixed.by_tokens
    assert (fixed.gradient_accumulation_steps, fixed.examples_per_step()) == (by_number, examples)


def test_a_budget_by_default_is_refused_what_the_number_is_refused(sharded, tmp_path):
    with raises("training.indivisible-batch", RecipeError):
        make(SFTConfig, tmp_path, per_device_train_batch_size=4, global_batch_size=12)
    with raises("training.conflicting-settings", RecipeError):
        make(SFTConfig, tmp_path, global_batch_size=32, gradient_accumulation_steps=3)


@pytest.mark.parametrize(
    ("fsdp", "stage", "launched", "waits"),
    [
        (None, None, None, False), (True, None, None, True),
        (None, None, "ACCELERATE_USE_FSDP", True),
        (None, 1, None, False), (None, 2, None, True), (None, 3, None, True),
    ],
)  # fmt: skip
def test_engines_whose_ranks_wait_in_each_micro_batch(fsdp, stage, launched, waits, monkeypatch):
    if launched:
        monkeypatch.setenv(launched, "true")
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    args = SimpleNamespace(fsdp=fsdp, deepspeed_plugin=plugin)
    assert waits_each_micro_batch(args) == waits


def test_one_rank_has_no_budget_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(base_config, "waits_each_micro_batch", lambda args: True)
    assert not make(SFTConfig, tmp_path).by_tokens


@pytest.mark.parametrize(
    ("micro", "batch", "nearest"), [(4, 30, "28 or 32"), (8, 3, "use 8"), (4, 0, "use 4")]
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(micro, batch, nearest, tmp_path):
    where = "SFTConfig.global_batch_size"
    with raises("training.indivisible-batch", RecipeError, where=where) as caught:
        make(SFTConfig, tmp_path, per_device_train_batch_size=micro, global_batch_size=batch)
    assert nearest in str(caught.value)


def test_defaults_are_those_of_the_method(tmp_path):
    dpo, rpo = make(DPOConfig, tmp_path), make(RPOConfig, tmp_path)
    assert (dpo.loss_type, dpo.beta, dpo.sft_loss_weight, dpo.sft_reduction) == (
        "dpo",
        0.1,
        0,
        "sum",
    )
    assert (rpo.loss_type, rpo.reward_scale) == ("rpo_bwd_kl", 1.0)
    assert dpo.disable_dropout and dpo.step0_check
    assert not dpo.logging_nan_inf_filter and not dpo.remove_unused_columns


def test_autocast_dtype(tmp_path):
    assert make(SFTConfig, tmp_path).mixed_precision_dtype() is None
    assert make(SFTConfig, tmp_path, bf16=True).mixed_precision_dtype() is torch.bfloat16


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_an_argument_of_another_library_is_answered_with_what_to_do(name, tmp_path):
    if name in {field.name for field in dataclasses.fields(DPOConfig)}:
        pytest.fail(f"{name} is taken here, so it needs no answer")
    with raises("training.unknown-argument", RecipeError, where="DPOConfig") as caught:
        make(DPOConfig, tmp_path, **{name: 1})
    assert name in caught.value.what
    assert caught.value.fix == f"{name}: {ELSEWHERE[name]}"


def test_what_an_answer_tells_to_write_is_taken():
    known = {
        field.name
        for config in (SFTConfig, DPOConfig, RPOConfig)
        for field in dataclasses.fields(config)
    }
    for answer in ELSEWHERE.values():
        assert set(re.findall(r"\b(?:write|set) ([a-z]+_[a-z_]+|beta|shuffle)", answer)) <= known


def test_all_unknown_arguments_are_reported_together_with_the_nearest_names(tmp_path):
    with raises("training.unknown-argument", RecipeError, where="RPOConfig") as caught:
        make(RPOConfig, tmp_path, learning_rates=1e-6, reward_scal=2, quite_other=1)
    answers = (caught.value.fix or "").split("; ")
    assert [answer.partition(":")[0] for answer in answers] == [
        "learning_rates", "reward_scal", "quite_other",
    ]  # fmt: skip
    assert "learning_rate?" in answers[0] and "reward_scale?" in answers[1]


def test_a_config_stays_a_dataclass_with_its_signature(tmp_path):
    parameters = inspect.signature(DPOConfig).parameters
    assert {"output_dir", "beta", "label_smoothing"} <= set(parameters)
    config = make(DPOConfig, tmp_path, beta=0.3)
    assert pickle.loads(pickle.dumps(config)).beta == 0.3
    assert dataclasses.replace(config, label_smoothing=0.1).beta == 0.3
