"""Training on a GPU: the selected layout, metrics equal to the CPU's, synchronizations, and resumed runs."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rpo_trainer.models.adapters import with_adapter
from tests.small_models import make_model
from tests.trainers.plain import make_rows

KS = {"sft": (1,) * 24, "dpo": (2,) * 24, "rpo": (2, 3, 4, 2) * 6}


def rows_of(kind: str) -> list[dict[str, Any]]:
    return make_rows(0, KS[kind], rewards=kind == "rpo")


def test_a_default_device_of_the_callers(start: Any) -> None:
    """`torch.device("cuda")` as the default; what is drawn on the CPU stays there."""
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    with torch.device("cuda"):
        model = with_adapter(copy.deepcopy(start).cuda(), adapter)
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


class Metrics(TrainerCallback):
    """The metrics that each step logs."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.lines.append(dict(logs))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize("arithmetic", ["float32", "autocast", "bfloat16"])
def test_prompts_are_shared(family: str, arithmetic: str, make_trainer: Any) -> None:
    """The proof compares to the last bit, and the GPU's arithmetic does not cause a fallback."""
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
    """In float32. Fractions of pairs are excluded: a difference of a last bit decides them at step 0."""
    found = []
    for use_cpu in (False, True):
        metrics = Metrics()
        make_trainer(
            kind, rows_of(kind), use_cpu=use_cpu, output_dir=str(tmp_path / f"cpu-{use_cpu}"),
            logging_strategy="steps", logging_steps=1, max_steps=6, callbacks=[metrics], optim="sgd",
            learning_rate=0.05, bf16=False, **({} if kind == "sft" else {"sft_loss_weight": 0.1}),
        ).train()  # fmt: skip
        found.append(metrics.lines)
    ours, expected = found
    assert len(ours) == len(expected) == 6
    for got, wanted in zip(ours, expected, strict=True):
        names = [
            name for name in wanted
            if name.startswith(("loss", "grad_norm", "logps/", "rewards/"))
            and not name.endswith(("falling", "accuracies"))
        ]  # fmt: skip
        assert len(names) > (1 if kind == "sft" else 6)
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
    """torch counts the synchronizations. More micro-batches per step add none, more steps one each."""

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

    waits(2, 2)  # once per process
    short, long, finer = waits(2, 2), waits(5, 2), waits(5, 1)
    added = long - short
    assert {place.split(":")[0] for place in added} == {"guards.py"}, added
    assert sum(added.values()) == 3
    assert finer == long


class Stop(TrainerCallback):
    """End a run after a step whose checkpoint is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def resumed_and_straight(
    kind: str, make_trainer: Any, folder: Path, **settings: Any
) -> list[dict[str, torch.Tensor]]:
    """Weights of a run resumed after half of its steps, and of two uninterrupted ones."""
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **settings}

    def run(name: str, **extra: Any) -> Any:
        return make_trainer(kind, rows_of(kind), output_dir=str(folder / name), **settings, **extra)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[Stop(3)]).train()
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    found = [weights(resumed)]
    for name in ("straight", "again"):
        trainer = run(name)
        trainer.train()
        found.append(weights(trainer))
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["sft", "rpo"])
def test_resumed_is_straight(
    kind: str, bf16: bool, make_trainer: Any, tmp_path: Path, record_property: Any
) -> None:
    """Up to the order in which the GPU adds gradients: no further apart than two uninterrupted runs."""
    resumed, straight, again = resumed_and_straight(
        kind, make_trainer, tmp_path, bf16=bf16, optim="sgd", learning_rate=0.1
    )
    between, distance = furthest(again, straight), furthest(resumed, straight)
    line = f"{kind}, bf16 {bf16}: straight runs {between:.1e} apart, resumed {distance:.1e}"
    record_property("table: weights of resumed runs on a GPU", line)
    assert distance <= max(10 * between, 1e-6)


@pytest.fixture
def determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `full_determinism` sets for the process is undone after the test."""
    names = ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("kind", ["sft", "rpo"])
@pytest.mark.usefixtures("determinism")
def test_resumed_is_straight_bitwise(kind: str, make_trainer: Any, tmp_path: Path) -> None:
    """With deterministic kernels there is no difference."""
    resumed, straight, _ = resumed_and_straight(
        kind, make_trainer, tmp_path, bf16=True, full_determinism=True
    )
    assert furthest(resumed, straight) == 0.0


def test_random_state_of_the_gpu_is_resumed(make_trainer: Any, tmp_path: Path) -> None:
    """Dropout uses the GPU's own generator."""
    noisy = make_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "sgd"}

    def run(name: str, **extra: Any) -> Any:
        return make_trainer(
            "sft", rows_of("sft"), model=copy.deepcopy(noisy), output_dir=str(tmp_path / name),
            **{**settings, **extra},
        )  # fmt: skip

    straight = run("straight")
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[Stop(2)]).train()
    torch.cuda.manual_seed(12345)  # a process does not start in the state of the previous one
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert furthest(weights(resumed), weights(straight)) < 1e-5
