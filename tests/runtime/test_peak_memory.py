"""Peak memory of this process only, in bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_trainer.runtime.memory import peak_memory

_CHILD = "from rpo_trainer.runtime.memory import peak_memory; print(peak_memory())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_the_peak_grows_with_what_is_held_and_stays() -> None:
    before = peak_memory()
    held = torch.ones(before // 4)  # as many bytes as the peak
    after = peak_memory()
    assert after >= before + held.numel()
    del held
    assert peak_memory() >= after - 2**21  # the kernel counts in batches of pages


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="elsewhere only ru_maxrss is to be had"
)
def test_a_large_parent_does_not_raise_it() -> None:
    """`ru_maxrss` starts at the parent's value, so that a report would show another process's memory."""
    held = torch.ones(2**28)  # 1 GiB
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < held.numel() * 4
