"""`torch_compile`: the same losses, and no recompilation for other lengths."""

from __future__ import annotations

import copy
import os
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, TrainerCallback

from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.step.attention import ATTENTION_NAME, packed_attention
from rpo_trainer.trainers import compiled
from tests.raising import raises
from tests.small_models import make_model
from tests.trainers.plain import make_rows

STEPS = 12
COMPILER = os.environ.get("CXX", "g++")
INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"),
    ],
)


class Graphs(TrainerCallback):
    """Record the number of compiled graphs at the end of each step."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


@pytest.fixture
def losses_of(make_trainer):
    """`losses_of("rpo", family, ...)`: losses of the steps, and graphs compiled by the end of each."""

    def run(kind: str, family: str = "llama", **settings: Any) -> tuple[list[float], list[int]]:
        graphs = Graphs()
        ks = (1,) * 40 if kind == "sft" else (2, 3, 2, 5, 2, 2, 3, 2, 4, 2) * 4
        trainer = make_trainer(
            kind, make_model(family), make_rows(0, ks, rewards=kind == "rpo"), callbacks=[graphs],
            **{
                "max_steps": STEPS, "global_batch_size": 4, "optim": "adamw_torch",
                "learning_rate": 1e-3, "max_grad_norm": 1.0, "logging_strategy": "steps",
                "logging_steps": 1, **settings,
            },
        )  # fmt: skip
        trainer.train()
        assert not hasattr(trainer.model, "_orig_mod")
        return [line["loss"] for line in trainer.state.log_history if "loss" in line], graphs.after

    return run


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
@pytest.mark.parametrize(
    ("kind", "family", "settings"),
    [
        ("rpo", "llama", {}),
        pytest.param("sft", "gemma3_text", {}, marks=pytest.mark.slow),  # layers of two kinds
        pytest.param("rpo", "llama", {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("rpo", "llama", {"micro_batch_tokens": 90}, marks=pytest.mark.slow),
        pytest.param("rpo", "llama", {"layout": "padded"}, marks=pytest.mark.slow),
        pytest.param("rpo", "qwen3", {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_losses_are_the_same_and_the_first_step_compiles_all(
    backend, kind, family, settings, losses_of
):
    expected, graphs = losses_of(kind, family, **settings)
    assert graphs[-1] == 0
    losses, graphs = losses_of(kind, family, torch_compile_backend=backend, **settings)
    tolerance = 0.02 if settings.get("bf16") else 1e-5
    assert losses == pytest.approx(expected, abs=tolerance)
    assert len(losses) == STEPS
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[-1] == graphs[2], graphs  # three steps have covered all differences except length
    assert not counters["recompile_limit"]


def test_a_backend_that_does_not_work_is_refused(make_trainer, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no g++ found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    with raises("training.compiler-fails", RecipeError) as error:
        make_trainer("sft", make_model(), make_rows(0, (1,) * 4), torch_compile=True)
    assert error.value.why == "no g++ found" and "inductor" in error.value.what


def test_a_model_without_layers_is_refused(make_trainer, monkeypatch):
    class Never:
        pass

    monkeypatch.setattr(compiled, "GradientCheckpointingLayer", Never)
    with raises("model.not-compilable", ModelError) as error:
        make_trainer("sft", make_model(), make_rows(0, (1,) * 4), torch_compile_backend="eager")
    assert "LlamaForCausalLM" in error.value.what


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_record_every_length_are_refused(mode, make_config):
    with raises("training.unsupported-setting", RecipeError, settings=["torch_compile_mode"]):
        make_config("sft", torch_compile_mode=mode)


def test_a_run_after_a_compiled_one_is_not_compiled(make_trainer):
    rows = make_rows(0, (1,) * 4)
    model = make_model()
    make_trainer("sft", copy.deepcopy(model), rows, torch_compile_backend="eager")
    trainer = make_trainer("sft", model, rows)
    before = counters["stats"]["unique_graphs"]
    trainer.train()
    assert counters["stats"]["unique_graphs"] == before
