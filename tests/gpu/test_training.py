"""Training on a GPU: the layout that the probe picks, the figures of the CPU, waits, and resumed runs."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.models import make_model
from tests.trainers.plain import make_rows

KS = {"sft": (1,) * 24, "dpo": (2,) * 24, "rpo": (2, 3, 4, 2) * 6}


def rows_of(kind: str) -> list[dict[str, Any]]:
    return make_rows(0, KS[kind], rewards=kind == "rpo")


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


class Metrics(TrainerCallback):
    """What each step logs."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.lines.append(dict(logs))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize("arithmetic", ["float32", "autocast", "bfloat16"])
def test_prompts_are_shared(family: str, arithmetic: str, make_trainer: Any) -> None:
    """The proof compares to the last bit, and nothing of the GPU's arithmetic makes it fall back."""
    model = make_model(family, max_position_embeddings=512)
    if arithmetic == "bfloat16":
        model = model.bfloat16()
    trainer = make_trainer(
        "dpo", rows_of("dpo"), model=model, max_steps=1, bf16=arithmetic == "autocast"
    )
    assert next(trainer.model.parameters()).device.type == "cuda"
    trainer.train()
    assert trainer.layout == "shared"


@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
def test_the_figures_are_those_of_the_cpu(kind: str, make_trainer: Any, tmp_path: Path) -> None:
    found = []
    for use_cpu in (False, True):
        metrics = Metrics()
        make_trainer(
            kind, rows_of(kind), use_cpu=use_cpu, output_dir=str(tmp_path / f"cpu-{use_cpu}"),
            logging_strategy="steps", logging_steps=1,
            max_steps=6, callbacks=[metrics], **({} if kind == "sft" else {"sft_loss_weight": 0.1}),
        ).train()  # fmt: skip
        found.append(metrics.lines)
    ours, expected = found
    assert len(ours) == len(expected) == 6
    for got, wanted in zip(ours, expected, strict=True):
        names = [
            name for name in wanted if name.startswith(("loss", "grad_norm", "logps", "rewards"))
        ]
        assert names
        for name in names:
            assert got[name] == pytest.approx(wanted[name], rel=2e-4, abs=2e-4), name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("dpo", {"sft_loss_weight": 0.1}),
        ("rpo", {"sft_loss_weight": 0.1}),
        ("rpo", {"layout": "packed"}),
        ("rpo", {"bf16": False}),
        ("rpo", {"gradient_checkpointing": True}),
    ],
)
def test_the_host_waits_once_a_step(
    kind: str, settings: dict[str, Any], make_trainer: Any, tmp_path: Path
) -> None:
    """torch counts the waits itself. More micro-batches in a step add none, more steps one each."""

    def waits(steps: int, micro: int) -> Counter[str]:
        trainer = make_trainer(
            kind, rows_of(kind), max_steps=steps, per_device_train_batch_size=micro,
            output_dir=str(tmp_path / f"{steps}-{micro}"), optim="adamw_torch_fused",
            **{"bf16": True, **settings},
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)
        )

    waits(2, 2)  # what happens once in a process
    short, long, finer = waits(2, 2), waits(5, 2), waits(5, 1)
    added = long - short
    assert {place.split(":")[0] for place in added} == {"guards.py"}, added
    assert sum(added.values()) == 3
    assert finer == long


class Stop(TrainerCallback):
    """Ends a run after a step, its checkpoint written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["sft", "rpo"])
def test_resumed_is_straight(kind: str, bf16: bool, make_trainer: Any, tmp_path: Path) -> None:
    """Bitwise, unless two straight runs differ too: then no further than four times as far as these."""
    settings = {"bf16": bf16, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    straight = []
    for number in range(2):
        trainer = make_trainer(
            kind, rows_of(kind), output_dir=str(tmp_path / f"{number}"), **settings
        )
        trainer.train()
        straight.append(weights(trainer))
    folder = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            kind, rows_of(kind), output_dir=folder, callbacks=[Stop(3)], **settings
        ).train()
    trainer = make_trainer(kind, rows_of(kind), output_dir=folder, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    between = furthest(straight[1], straight[0])
    resumed = furthest(weights(trainer), straight[0])
    print(json.dumps({"kind": kind, "bf16": bf16, "straight": between, "resumed": resumed}))
    assert resumed <= 4 * between


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_random_state_of_the_gpu_is_resumed(
    optimizer: str, make_trainer: Any, tmp_path: Path
) -> None:
    """Dropout draws from the GPU's own generator."""
    noisy = make_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": optimizer}

    def run(name: str, **extra: Any) -> Any:
        return make_trainer(
            "sft", rows_of("sft"), model=copy.deepcopy(noisy), output_dir=str(tmp_path / name),
            **{**settings, **extra},
        )  # fmt: skip

    straight = run("straight")
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[Stop(2)]).train()
    torch.cuda.manual_seed(12345)  # a process does not start in the state of the one before
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert furthest(weights(resumed), weights(straight)) < 1e-6
