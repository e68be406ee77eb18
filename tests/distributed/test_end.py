"""Every command leaves the process group: a finished run of several processes ends with exit code 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpo_trainer.data.quickstart import character_tokenizer
from tests.chain import tiny
from tests.distributed.launch import accelerate, by_launcher, run, torchrun
from tests.rewards.policies import llama

pytestmark = pytest.mark.slow

LAUNCHES = 20
# Threads that a process still has when its command ends; those of a process group would be among them.
THREADS = """
import atexit, os, sys
def threads():
    found = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
    print("GROUP THREADS", [name for name in found if "gloo" in name or "nccl" in name], flush=True)
atexit.register(threads)
"""


def recipe(folder: Path) -> Path:
    made = tiny.tiny_recipe()
    made["stages"] = [tiny.stage_of(made, "code")]
    made["stages"][0] |= {"max_steps": 2, "save_steps": None}
    made["defaults"]["micro_batch_size"] = 4
    return tiny.write_recipe(folder, made)


def threads_left(output: str) -> list[str]:
    """The threads that each rank has printed at its end."""
    return [line for line in output.splitlines() if line.startswith("GROUP THREADS")]


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    exec({THREADS!r})\n"
    )
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_an_exchange_that_ends_late_does_not_abort_the_process() -> None:
    """Without `distributed.end` the first rank is ended by SIGABRT, with "terminate called"."""
    ended = run(torchrun("tests.distributed.finishing", "end"))
    assert ended.returncode == 0, ended.stdout[-3000:]


@pytest.mark.parametrize("mistake", [None, "run_dir", "data"])
def test_nothing_of_the_group_is_left_after_a_run(
    mistake: str | None, tmp_path: Path, watched: dict[str, str]
) -> None:
    path, run_dir = recipe(tmp_path), tmp_path / "run"
    if mistake == "run_dir":
        run_dir.write_text("a file")
    words = ["stages.code.max_length=2"] if mistake == "data" else []
    command = torchrun("rpo_trainer", "run", str(path), "--run-dir", str(run_dir), "--no-report")
    ended = run([*command, *words], **watched)
    assert bool(ended.returncode) == (mistake is not None), ended.stdout[-3000:]
    assert threads_left(ended.stdout) == ["GROUP THREADS []"] * 2, ended.stdout[-3000:]


def test_nothing_of_the_group_is_left_after_sampling(
    tmp_path: Path, watched: dict[str, str]
) -> None:
    llama().save_pretrained(tmp_path / "policy")
    character_tokenizer().save_pretrained(tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} + 1 = "}) + "\n" for i in range(4)))
    command = torchrun(
        "rpo_trainer", "generate", str(prompts), "--policy", str(tmp_path / "policy"),
        "--max-new-tokens", "3", "-o", str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    ended = run(command, **watched)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert threads_left(ended.stdout) == ["GROUP THREADS []"] * 2, ended.stdout[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["accelerate launch", "torchrun"])
def test_many_launches_in_a_row_all_end_well(launcher: str, tmp_path: Path) -> None:
    path = recipe(tmp_path)
    codes = []
    for number in range(LAUNCHES):
        command = (
            accelerate("ddp")
            if launcher.startswith("accelerate")
            else by_launcher("torchrun", "--nproc_per_node")
        )
        folder = tmp_path / f"run-{number}"
        site = str(Path(__file__).parent / "site")
        ended = run([*command, str(path), "--run-dir", str(folder)], PYTHONPATH=site)
        assert "terminate called" not in ended.stdout, ended.stdout[-3000:]
        codes.append(ended.returncode)
    assert codes == [0] * LAUNCHES
