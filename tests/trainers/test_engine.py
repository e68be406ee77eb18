"""What is refused and corrected before an engine wraps the model; runs of engines: tests/distributed."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy

from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.models.adapters import with_adapter
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.trainers import SFTTrainer, engine
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import make_rows


def accelerator(kind: DistributedType, ranks: int = 2, **plugins: Any) -> Any:
    return SimpleNamespace(
        distributed_type=kind, num_processes=ranks, state=SimpleNamespace(**plugins)
    )


def arguments(**more: Any) -> Any:
    given = {
        "deepspeed": None, "fsdp": None, "bf16": False, "fp16": False, "mixed_precision": "no",
        "max_grad_norm": 1.0, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    given |= more
    return SimpleNamespace(
        **{"accumulation_by_number": given["gradient_accumulation_steps"], **given}
    )


NONE = accelerator(DistributedType.NO, 1)


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch):
    engine.check_engine(arguments(), NONE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises("training.processes-not-joined", RecipeError):
        engine.check_engine(arguments(), NONE)


@pytest.mark.parametrize(("launched", "refused"), [("1", False), ("4", False), ("8", True)])
def test_accumulation_that_a_launcher_asks_for_is_the_configs(launched, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", launched)
    if not refused:
        engine.check_engine(arguments(), NONE)
        return
    with raises("training.launcher-conflict", RecipeError) as caught:
        engine.check_engine(arguments(), NONE)
    assert caught.value.where == "gradient_accumulation_steps"
    assert "8" in caught.value.what and "4" in caught.value.what


def test_a_launchers_parallelism_config_is_refused():
    parallel = SimpleNamespace(**{**vars(NONE), "parallelism_config": object()})
    with raises("training.unsupported-engine", RecipeError) as error:
        engine.check_engine(arguments(), parallel)
    assert "parallelism_config" in error.value.what


def test_the_trainer_checks(monkeypatch: pytest.MonkeyPatch, make_config, start, tokenizer):
    args = make_config("sft")  # accelerate has found one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises("training.processes-not-joined", RecipeError):
        SFTTrainer(copy.deepcopy(start), args, make_rows(0, (1,) * 4), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("given", "variable", "name"),
    [
        ({"deepspeed": {}}, None, None),
        ({"deepspeed": {"zero_optimization": {}}}, None, "DeepSpeed"),
        ({"fsdp": True}, None, "FSDP"),
        ({}, "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ({}, "ACCELERATE_USE_FSDP", "FSDP"),
    ],
)
def test_an_engine_that_has_not_started_is_refused(
    given: Any, variable: Any, name: Any, monkeypatch: pytest.MonkeyPatch
):
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    assert engine.requests_sharding(given) == (name is not None)
    if name is None:
        engine.check_engine(arguments(**given), NONE)
        return
    with raises("training.engine-not-started", RecipeError, engine=name):
        engine.check_engine(arguments(**given), NONE)


def test_fsdp_1_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = accelerator(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with raises("training.unsupported-engine", RecipeError) as error:
        engine.check_engine(arguments(fsdp=True), first)
    assert "FSDP 1" in error.value.what


@pytest.mark.parametrize(
    ("launched", "given"), [("bf16", {}), ("no", {"bf16": True}), ("bf16", {"fp16": True})]
)
def test_a_launcher_of_another_precision_is_refused(launched: str, given: Any):
    with raises("training.launcher-conflict", RecipeError, where="mixed_precision"):
        engine.check_engine(arguments(mixed_precision=launched, **given), NONE)


def test_fsdp_does_not_round_log_probs():
    low = torch.bfloat16
    plugin = SimpleNamespace(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=low, output_dtype=low
        )
    )
    engine.apply_engine_overrides(
        arguments(), accelerator(DistributedType.FSDP, fsdp_plugin=plugin)
    )
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (low, torch.float32)
    assert policy.output_dtype is None


@pytest.mark.parametrize("clipping", [{}, {"gradient_clipping": "auto"}, {"gradient_clipping": 1}])
def test_deepspeed_clips_as_the_recipe_says(clipping: Any):
    config = dict(clipping)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    engine.apply_engine_overrides(
        arguments(), accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    )
    assert config["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("stage", "given", "expected"),
    [
        (2, {}, {"lower_precision_safe_modules": []}), (3, {}, {}),
        (2, {"lower_precision_safe_modules": ["x"]}, {"lower_precision_safe_modules": ["x"]}),
    ],
)  # fmt: skip
def test_bfloat16_under_deepspeed_is_autocast(stage: int, given: Any, expected: Any):
    config = {
        "bf16": {"enabled": True}, "torch_autocast": given, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    wrapped = accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    engine.apply_engine_overrides(arguments(bf16=True), wrapped)
    assert config["bf16"] == {"enabled": False} and wrapped.native_amp
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", **expected}


@pytest.mark.parametrize("launched", [False, True])
def test_deepspeed_loads_weights_in_float32(launched: bool):
    refreshed: list[bool] = []
    plugin = SimpleNamespace(
        deepspeed_config={"bf16": {"enabled": True}}, dschf=object() if launched else None,
        set_deepspeed_weakref=lambda: refreshed.append(True),
    )  # fmt: skip
    for half in (False, True):
        engine.load_in_float32(arguments(deepspeed_plugin=plugin, bf16=half))
        assert ("bf16" in plugin.deepspeed_config) == (not half)
    assert bool(refreshed) == launched
    engine.load_in_float32(arguments(deepspeed_plugin=None, bf16=True))


def test_float16_under_deepspeed_is_refused():
    with raises("training.unsupported-engine", RecipeError) as error:
        engine.check_engine(
            arguments(fp16=True, deepspeed={"x": 1}), accelerator(DistributedType.DEEPSPEED, 1)
        )
    assert "float16" in error.value.what


def test_deepspeed_that_would_clip_otherwise_is_refused():
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"gradient_clipping": 0.5}))
    wrapped = accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    with raises("training.conflicting-settings", RecipeError, where="gradient_clipping") as error:
        engine.apply_engine_overrides(arguments(), wrapped)
    assert "0.5" in error.value.what and "1.0" in error.value.what


def experts() -> Any:
    model = make_model()
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    return model


def beside() -> Any:
    model = make_model()
    model.tower = torch.nn.Linear(2, 2)
    return model


def frozen_beside() -> Any:
    model = beside()
    model.tower.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_model, False), (lambda: make_model("gpt2"), False), (experts, True), (beside, True),
        (frozen_beside, False), (lambda: as_reward_model(make_model()), False),
        (lambda: with_adapter(make_model(), LoraConfig(modules_to_save=["lm_head"])), False),
    ],
)  # fmt: skip
def test_ddp_looks_for_unused_weights_where_there_may_be_some(make: Any, expected: bool):
    model, handler = make(), SimpleNamespace(find_unused_parameters=None)
    for told, found in ((None, expected), (True, None)):
        handler.find_unused_parameters = None
        args = arguments(ddp_find_unused_parameters=told)
        engine.set_find_unused_parameters(model, args, SimpleNamespace(ddp_handler=handler))
        assert handler.find_unused_parameters is found
    engine.set_find_unused_parameters(model, arguments(), SimpleNamespace(ddp_handler=None))


def deepspeed(stage: int, ranks: int) -> Any:
    plugin = SimpleNamespace(zero_stage=stage)
    return accelerator(DistributedType.DEEPSPEED, ranks, deepspeed_plugin=plugin)


FSDP = accelerator(DistributedType.FSDP, 4, fsdp_plugin=SimpleNamespace(fsdp_version=2))
DDP = accelerator(DistributedType.MULTI_CPU)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (NONE, NONE), (NONE, DDP), (DDP, NONE), (deepspeed(3, 2), deepspeed(3, 2)),
        (accelerator(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=2)), FSDP),
    ],
)  # fmt: skip
def test_checkpoints_of_another_world_are_taken_where_they_can_be(before, now, tmp_path):
    engine.check_same_engine(tmp_path, now)  # written before this field existed
    engine.write_engine(tmp_path, before)
    engine.check_same_engine(tmp_path, now)


@pytest.mark.parametrize(
    ("before", "now", "wrote", "reads"),
    [
        (deepspeed(3, 2), deepspeed(3, 4), ("zero3", 2), ("zero3", 4)),
        (deepspeed(2, 2), deepspeed(3, 2), ("zero2", 2), ("zero3", 2)),
        (DDP, FSDP, ("ddp", 2), ("fsdp2", 4)),
        (FSDP, NONE, ("fsdp2", 4), ("none", 1)),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(before, now, wrote, reads, tmp_path):
    engine.write_engine(tmp_path, before)
    of = [{"engine": engine, "world_size": ranks} for engine, ranks in (wrote, reads)]
    with raises("run.other-engine", RunError, before=of[0], now=of[1]):
        engine.check_same_engine(tmp_path, now)


def test_a_checkpoint_says_who_wrote_it(make_trainer, start, tmp_path):
    trainer = make_trainer(
        "sft", copy.deepcopy(start), make_rows(0, (1,) * 4), save_strategy="steps", save_steps=1,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer.train()
    noted = json.loads((tmp_path / "checkpoint-1" / engine.ENGINE_FILE).read_text())
    assert noted == {"engine": "none", "world_size": 1}
