"""Adapters in the trainers: the update, the reference, precision, and models prepared by callers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rpo_trainer.errors import ModelError, RecipeError, StepZeroError
from rpo_trainer.models.unwrap import unwrap_prepared_model
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import (
    PAIRS,
    Objective,
    assert_same_update,
    global_batches,
    plain_reference,
    plain_train,
    rows_of,
)

peft = pytest.importorskip("peft")


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **settings})


def moved(model: Any) -> Any:
    """Return the model with its adapter changed from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["q_proj", "lm_head"]),
        lora(use_dora=True),
        lora(use_rslora=True, modules_to_save=["lm_head"]),
    ],
    ids=["head", "DoRA", "rsLoRA, head saved"],
)
def test_updates_are_those_of_unpacked_training_through_peft(
    config: Any, checkpointing: bool, make_trainer: Any, start: Any
) -> None:
    if checkpointing and config.use_dora:
        pytest.skip("one of the others shows it")
    rows = rows_of("rpo", PAIRS)
    model = moved(peft.get_peft_model(copy.deepcopy(start), config).double())
    reference = plain_reference(start, rows)
    settings = {"beta": 0.5, "sft_loss_weight": 0.1}
    batches = [*global_batches(rows, 8), *global_batches(rows, 8, epoch=1)]
    objective = Objective("rpo_bwd_kl", reference, **settings)
    expected = plain_train(model, objective, batches, lr=0.1)
    trainer = make_trainer(
        "rpo", copy.deepcopy(model), rows, ref_model=copy.deepcopy(start), global_batch_size=8,
        max_steps=len(batches), gradient_checkpointing=checkpointing, **settings,
    )  # fmt: skip
    trainer.train()
    assert_same_update(model, trainer.model, expected, 1e-5)
    assert not hasattr(trainer, "step_zero")  # the reference is not the initial policy


# --- the reference ---


def test_a_fresh_adapter_over_the_reference_is_checked_at_step_0(
    make_trainer: Any, start: Any, tmp_path: Path
) -> None:
    rows = rows_of("dpo", PAIRS)

    def trainer(**settings: Any) -> Any:
        return make_trainer(
            "dpo", copy.deepcopy(start), rows, ref_model=copy.deepcopy(start),
            peft_config=lora(), global_batch_size=8, **settings,
        )  # fmt: skip

    first = trainer()
    first.train()
    assert first.step_zero["nats_per_token"] < 1e-6
    wrong = trainer(reference_cache_dir=str(tmp_path / "another"))
    make = wrong._reference_of
    wrong._reference_of = lambda *args: [[v + 1.0 for v in row] for row in make(*args)]
    with raises("training.step-zero", StepZeroError, cause="ref-model"):
        wrong.train()


def test_the_model_inside_the_adapter_is_no_reference(make_trainer: Any, start: Any) -> None:
    base = copy.deepcopy(start)
    model = peft.get_peft_model(base, lora())
    with raises("model.reference-in-policy", RecipeError):
        make_trainer("dpo", model, rows_of("dpo", PAIRS), ref_model=base)
    trainer = make_trainer("dpo", model, rows_of("dpo", PAIRS), ref_model=model)
    assert trainer.ref_model is None


# --- what is accepted ---


@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prompt_learning_is_refused(
    kind: str, wrapped: bool, make_trainer: Any, start: Any
) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = copy.deepcopy(start)
    given = {"peft_config": config}
    if wrapped:
        model, given = peft.get_peft_model(model, config), {}
    with raises("adapter.unsupported-method", ModelError) as error:
        make_trainer(kind, model, rows_of(kind, PAIRS), **given)
    assert "PREFIX_TUNING" in error.value.what and "virtual tokens" in str(error.value.why)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_stay_float32_under_bfloat16(dtype: torch.dtype, make_trainer: Any) -> None:
    trainer = make_trainer(
        "rpo", make_model(dtype=dtype), rows_of("rpo", PAIRS), peft_config=lora(),
        global_batch_size=8, max_steps=3, learning_rate=1.0, bf16=True,
    )  # fmt: skip
    trainer.train()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert any(p.any() for n, p in trained.items() if "lora_B" in n)
    assert trainer.step_zero["nats_per_token"] < 0.02


# --- models that an Accelerator has prepared ---


def test_a_prepared_model_is_taken_out_of_it() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = make_model()
        own = type(model).forward
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert prepared.forward.__func__ is not own
        out = unwrap_prepared_model(prepared)
        assert out is model and "_original_forward" not in vars(out)
        ids = torch.arange(4, 20)[None]
        torch.testing.assert_close(out(ids).logits, make_model()(ids).logits, rtol=0, atol=0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert unwrap_prepared_model(model) is model


def test_an_engine_is_refused(make_trainer: Any) -> None:
    class DeepSpeedEngine(torch.nn.Module):
        pass

    with raises("model.already-prepared", ModelError) as error:
        make_trainer("dpo", DeepSpeedEngine(), rows_of("dpo", PAIRS))
    assert "DeepSpeedEngine" in error.value.what and "accelerator.prepare" in str(error.value.fix)
