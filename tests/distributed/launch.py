"""Start processes on this machine's CPUs as users do."""

from __future__ import annotations

import os
import re
import shlex
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
    """Skip the test if the engine cannot start on this machine."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="requires deepspeed: the extra `test-all` has it")
    if engine.startswith("zero") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip(
            "on CPUs DeepSpeed compiles an operation at its first start: no C++ compiler here"
        )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """The environment of a new shell: no outer rank, one thread per rank, this Python first."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_", "FSDP_", "DS_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **more,
    }  # fmt: skip


def torchrun(*command: str, ranks: int = 2, restarts: int = 0) -> list[str]:
    """`torchrun -m COMMAND` on a separate port, so that concurrent tests do not collide."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
        "--max-restarts", str(restarts), "--master_addr", "127.0.0.1",
        "--master_port", str(free_port()), "-m", *command,
    ]  # fmt: skip


def documented(launcher: str) -> list[str]:
    """The command line of a launcher as documented, without the recipe."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [
        line
        for page in pages
        for line in re.findall(rf"^ *({launcher} .* run) RECIPE", page.read_text(), re.MULTILINE)
    ]
    assert len(set(lines)) == 1, (launcher, lines)
    return shlex.split(lines[0])


def by_launcher(launcher: str, processes: str, ranks: int = 2) -> list[str]:
    """That command line with `ranks` processes and a separate port.

    Args:
        processes: the option that says how many there are.
    """
    words = documented(launcher)
    words[words.index(processes) + 1] = str(ranks)
    return [words[0], "--master_port", str(free_port()), *words[1:]]


def accelerate(config: str, ranks: int = 2) -> list[str]:
    """The command line of accelerate with another shipped configuration."""
    words = documented("accelerate launch")
    words[words.index("--config_file") + 1] = f"recipes/accelerate/{config}.yaml"
    processes = [] if config == "single" else ["--num_processes", str(ranks)]
    return [*words[:2], "--main_process_port", str(free_port()), *processes, *words[2:]]


def run(
    command: Sequence[str], *, timeout: float = 600, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `stdout` has the output of all ranks. A timeout also ends the ranks."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher passes it on
        output, _ = process.communicate()
        raise AssertionError(f"not at its end in {timeout} s: {output[-5000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)
