"""Large blocks are reused without new pages during CPU training, and are returned afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.runtime.memory import _glibc
from tests.small_models import make_model

pytestmark = pytest.mark.skipif(_glibc() is None, reason="needs glibc")

_HELD = """
MIB = 2**20

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // MIB
"""
_PROGRAM = (
    _HELD
    + """
import contextlib, resource, sys, torch
from rpo_trainer.runtime.memory import keeping_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(64 * MIB // 4)  # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = held()
with keeping_freed_memory():
    faults(20)  # until blocks of this size have found their places
    inside, kept = faults(10), held() - before
print(inside, kept, held() - before, faults(10))
"""
)


def figures(**environment: str) -> tuple[int, ...]:
    """Page faults of ten blocks inside; MiB kept inside and afterwards; page faults of ten afterwards."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**clean, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(map(int, done.stdout.split()))


def test_blocks_are_kept_inside_and_returned_afterwards() -> None:
    inside, kept, left, behind = figures()
    assert inside < 100
    assert kept >= 60
    assert left < 10
    assert behind > 1000 or behind > 10 * inside  # the default again; huge pages cause fewer faults


def test_small_blocks_between_kept_ones_are_returned() -> None:
    program = (
        _HELD
        + """
from rpo_trainer.runtime.memory import return_freed_memory

texts = [str(number) * 600 for number in range(50_000)]
kept = texts[::500]
full = held()
del texts
before = held()
return_freed_memory()
print(full, before, held())
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    full, before, after = map(int, done.stdout.split())
    assert before - after > 80 > full - before


def test_the_users_own_setting_counts_alone() -> None:
    _, kept, _, _ = figures(MALLOC_TRIM_THRESHOLD_="65536")
    assert kept < 10


def test_a_trainer_on_a_cpu_uses_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rpo_trainer import SFTConfig, SFTTrainer
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.trainers import base

    entered = []

    @contextlib.contextmanager
    def noted() -> Any:
        entered.append("in")
        yield
        entered.append("out")

    monkeypatch.setattr(base, "keeping_freed_memory", noted)
    tokenizer = character_tokenizer()
    trainer = SFTTrainer(
        make_model("llama", vocab_size=len(tokenizer)),
        SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        [{"prompt": "a", "response": "b"}],
        processing_class=tokenizer,
    )
    trainer.train()
    assert entered == ["in", "out"]


def test_the_reference_pass_uses_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rpo_trainer import DPOConfig, DPOTrainer
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.step import reference
    from rpo_trainer.trainers import base

    order: list[str] = []

    @contextlib.contextmanager
    def noted() -> Any:
        order.append("in")
        yield
        order.append("out")

    computed = reference.dataset_logprobs

    def passed(*args: Any, **kwargs: Any) -> Any:
        order.append("reference")
        return computed(*args, **kwargs)

    monkeypatch.setattr(base, "keeping_freed_memory", noted)
    monkeypatch.setattr(reference, "dataset_logprobs", passed)
    tokenizer = character_tokenizer()
    trainer = DPOTrainer(
        make_model("llama", vocab_size=len(tokenizer)), None,
        DPOConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        ),
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert order == ["in", "reference", "out"]
