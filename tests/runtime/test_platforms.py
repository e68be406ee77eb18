"""Other systems: Windows, where POSIX modules and functions are missing, and Apple's MPS."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rpo_trainer
from rpo_trainer.recipe import ModelSpec
from rpo_trainer.runtime import devices
from rpo_trainer.stages.settings import arithmetic
from tests.chain import tiny

ROOT = Path(__file__).parents[2]


def without_posix(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.no_posix", *words],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_module_is_imported_without_posix() -> None:
    imported = set(without_posix("imports").split())
    every = {m.name for m in pkgutil.walk_packages(rpo_trainer.__path__, "rpo_trainer.")}
    left = {name for name in every - imported if ".sandbox" not in name}
    assert left == {"rpo_trainer.__main__"}


@pytest.mark.slow
def test_a_recipe_is_checked_without_posix(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    without_posix("check", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".data"]  # prepared for the run


@pytest.mark.slow
def test_what_needs_posix_is_refused_or_done_otherwise() -> None:
    said = without_posix("asserts")
    assert "refused verifier.unsupported-system" in said
    assert all(name in said for name in ("os.fork", "os.killpg", "resource"))
    assert "cores" in without_posix("cores")


# --- MPS ---


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with MPS and no CUDA, on a version of macOS."""

    def on(macos: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        newer = lambda major, minor: (macos, 0) >= (major, minor)  # noqa: E731
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", newer)

    return on


@pytest.mark.parametrize(("macos", "dtype"), [(13, "float32"), (14, "bfloat16")])
def test_mps_is_taken_with_the_arithmetic_that_it_has(mps: Any, macos: int, dtype: str) -> None:
    mps(macos)
    assert devices.best_device() == torch.device("mps") and devices.has_accelerator()
    assert devices.bfloat16_supported() == (dtype == "bfloat16")
    assert arithmetic(ModelSpec(name_or_path="x", dtype="auto")) == dtype


def test_without_an_accelerator_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.best_device() == torch.device("cpu")
    assert not devices.has_accelerator() and not devices.bfloat16_supported()
    assert arithmetic(ModelSpec(name_or_path="x", dtype="auto")) == "float32"
    devices.empty_cache()


def test_sums_are_float64_where_the_device_has_it() -> None:
    assert devices.widest_float("mps") == torch.float32
    for device in ("cpu", "cuda", "cuda:1"):
        assert devices.widest_float(device) == torch.float64
    assert devices.widest(torch.ones(2)).dtype == torch.float64


class Float64Seen(TorchDispatchMode):
    """Record operations that return float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            self.found.append(str(func))
        return out


def test_a_training_step_needs_no_float64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CPU replaces a device without float64. The step-0 check computes its closed forms on the host."""
    from rpo_trainer import RPOConfig, RPOTrainer
    from rpo_trainer.data.quickstart import character_tokenizer
    from tests.small_models import make_model

    monkeypatch.setattr(devices, "_NO_FLOAT64", frozenset({"cpu"}))
    tokenizer = character_tokenizer()
    rows = [
        {"prompt": "1+1=", "chosen": f" {i}", "rejected": " x", "chosen_reward": 1.0,
         "rejected_reward": 0.0}
        for i in range(4)
    ]  # fmt: skip
    trainer = RPOTrainer(
        model=make_model(vocab_size=len(tokenizer)),
        args=RPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tokenizer,
    )  # fmt: skip
    step, seen = trainer.training_step, Float64Seen()

    def watched(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 0:
            return step(*args, **kwargs)
        with seen:
            return step(*args, **kwargs)

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert not seen.found
    assert trainer.step_zero is not None
    assert trainer.state.log_history[0]["loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
