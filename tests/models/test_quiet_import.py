"""Output of libraries that are imported after this package."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.extras("bitsandbytes")
def test_importing_bitsandbytes_prints_nothing() -> None:
    pytest.importorskip("bitsandbytes")
    done = subprocess.run(
        [sys.executable, "-c", "import rpo_trainer, peft.tuners.lora.bnb"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "gemm_4bit_forward" not in done.stdout + done.stderr
