"""Starts processes the way users do, on this machine's CPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def require(engine: str) -> None:
    """Skips where an engine cannot start on this machine."""
    if engine.startswith("zero") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip(
            "on CPUs DeepSpeed compiles an operation at its first start: no C++ compiler here"
        )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Of a fresh shell: no rank of an outer launcher, one thread a rank, this Python's programs first."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_", "FSDP_", "DS_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **more,
    }  # fmt: skip


def torchrun(*command: str, ranks: int = 2, restarts: int = 0) -> list[str]:
    """`torchrun -m COMMAND` on a port of its own, so that two tests never meet."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
        "--max-restarts", str(restarts), "--master_addr", "127.0.0.1",
        "--master_port", str(free_port()), "-m", *command,
    ]  # fmt: skip


def run(
    command: Sequence[str], *, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess:
    """Runs to the end; the output of all ranks is in `stdout`."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**more), text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
