"""The threads of training on a CPU: how they wait, their number, and other processes on the cores."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rpo_trainer.runtime import cores

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and control groups are of Linux")


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*cores._COUNTS, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spins(program: str, **environment: str) -> str:
    """What OpenMP reports about its waiting when it is loaded."""
    clean = {k: v for k, v in os.environ.items() if k not in cores._WAITING}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this OpenMP is not GNU's")
    return done.stderr.split("GOMP_SPINCOUNT = '")[1].split("'")[0]


@pytest.mark.slow
def test_threads_spin_briefly_unless_the_user_says_how_they_wait() -> None:
    first = "import rpo_trainer.cli.commands, torch"
    assert spins(first) == cores._SPINS
    assert spins(first, GOMP_SPINCOUNT="5") == "5"
    for policy in ("ACTIVE", "PASSIVE"):
        plain = spins("import torch", OMP_WAIT_POLICY=policy)
        assert spins(first, OMP_WAIT_POLICY=policy) == plain != cores._SPINS


def groups(folder: Path, files: dict[str, str], membership: str) -> None:
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "membership").write_text(membership)


V1 = {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}
QUOTAS = {
    "version 2": ({"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, "0::/a/b", 3),
    "a container's own root": ({"cpu.max": "400000 100000"}, "0::/docker/1", 4),
    "version 1": (V1, "3:memory:/x\n2:cpu:/a\n1:name=systemd:/", 3),
    "no quota": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", 16),
    "less than a core": ({"cpu.max": "20000 100000"}, "0::/", 1),
    "more than there are": ({"cpu.max": "9900000 100000"}, "0::/", 16),
    "nothing to read": ({}, "0::/", 16),
}


@linux
@pytest.mark.parametrize("case", QUOTAS)
def test_cores_are_those_granted(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files, membership, wanted = QUOTAS[case]
    groups(tmp_path, files, membership)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores.usable_cores() == wanted
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores.usable_cores() == max(1, wanted // 2)


@pytest.mark.parametrize(
    ("of_torch", "variable", "wanted"),
    [
        (8, None, 3), (4, None, 3), (8, "OMP_NUM_THREADS", 8), (8, "MKL_NUM_THREADS", 8),
        (6, None, 6), (2, None, 2),
    ],
    ids=["a core each", "two hardware threads", "OMP", "MKL", "set in torch", "few enough"],
)  # fmt: skip
def test_threads_are_lowered_to_the_cores(
    of_torch: int, variable: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: 8)
    monkeypatch.setattr(cores, "_quotas", lambda: [3.0])
    if variable:
        monkeypatch.setenv(variable, "8")
    torch.set_num_threads(of_torch)
    cores.limit_threads()
    assert torch.get_num_threads() == wanted


@linux
@pytest.mark.slow
def test_what_others_compute_is_measured_and_what_this_process_does_is_not() -> None:
    before, own = cores.OtherProcesses(), time.process_time()
    start = time.monotonic()
    while time.monotonic() < start + 1.0:
        pass
    alone = before.cores()
    own = (time.process_time() - own) / (time.monotonic() - start)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = cores.OtherProcesses()
        time.sleep(1.0)
        beside = before.cores()
    finally:
        busy.kill()
        busy.wait()
    assert alone is not None and beside is not None
    assert alone < len(os.sched_getaffinity(0)) - own + 0.1
    assert beside > 0.3
    assert cores.OtherProcesses().cores() is None  # too short to measure


@pytest.mark.parametrize(
    ("threads", "others", "warned"),
    [(4, 2.0, True), (4, 0.2, False), (2, 2.0, False), (1, 4.0, False), (4, None, False)],
)
def test_a_warning_where_threads_and_others_are_more_than_the_cores(
    threads: int,
    others: float | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: 4)
    monkeypatch.setattr(cores.OtherProcesses, "cores", lambda _: others)
    cores._logged_levels.clear()
    torch.set_num_threads(threads)
    with caplog.at_level(logging.INFO):
        cores.OtherProcesses().report()
        cores.OtherProcesses().report()
    levels = [record.levelno for record in caplog.records]
    assert levels == ([logging.WARNING] if warned else [logging.INFO])


def test_a_trainer_on_a_cpu_says_its_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rpo_trainer import SFTConfig, SFTTrainer
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.trainers import base
    from tests.small_models import make_model

    said: list[str] = []
    fake = SimpleNamespace(report=lambda: said.append("threads"))
    monkeypatch.setattr(base, "limit_threads", lambda: said.append("limited"))
    monkeypatch.setattr(base, "OtherProcesses", lambda: fake)
    SFTTrainer(
        make_model(vocab_size=100),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=[{"prompt": "a", "completion": "b"}] * 2,
        processing_class=character_tokenizer(),
    ).train()  # fmt: skip
    assert said == ["limited", "threads"]
