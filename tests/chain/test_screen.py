"""What a run shows: in a terminal of 80 columns and in a pipe, no line of another library among it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.chain import tiny

COLUMNS = 80
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_BACK = re.compile(r"\r|\x1b\[\d*[AK]")
_BAR = re.compile(r"[━╸╺]{10,}")
_TIME = r"(\d+:)?\d\d:\d\d"  # hours only on a slow machine
# How the lines of a run begin; a wrapped one goes on after two spaces.
_OWN = re.compile(
    r"\[\d/\d [\w-]+\] |  |step layout|step-0 check|CPU threads|\d+ CPU threads|\d+ of \d+ sampled"
    r"|checking$|loss |run$|after |model: |report: |code |general |dpo |rpo-\d |chain |all stages in "
    r"|previous process of "
)


def in_terminal(*arguments: str) -> tuple[int, str]:
    """The exit code of the command, and all that it writes to a terminal of 80 columns."""
    process, stream = pty.fork()
    if process == 0:
        # Here and not in the parent: the size is known before the command starts.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.getcwd()}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        os.execve(sys.executable, [sys.executable, "-m", "rpo_trainer", *arguments], environment)
    found = b""
    while True:
        try:
            part = os.read(stream, 65536)
        except OSError:  # the process has ended
            break
        if not part:
            break
        found += part
    os.close(stream)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), found.decode()


def lines_of(text: str) -> list[str]:
    """What is drawn: where the cursor moves back, a line ends."""
    text = _CONTROL.sub("", _BACK.sub("\n", text))
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def foreign(lines: list[str]) -> list[str]:
    return [line for line in lines if not _OWN.match(line) and not _BAR.search(line)]


def unfinished(run_dir: Path, stage: str) -> None:
    """The run as it was when this stage, the last, had its last checkpoint and no output."""
    shutil.rmtree(run_dir / stage / "final")
    state = json.loads((run_dir / "chain.json").read_text())
    state.pop("digest")
    record = next(one for one in state["stages"] if one["name"] == stage)
    for key in ("steps", "eval", "output", "finished", "eval_after"):
        record.pop(key, None)
    record["state"] = "running"
    (run_dir / "chain.json").write_text(json.dumps(state))


@pytest.mark.slow
def test_a_run_in_a_terminal(tmp_path: Path) -> None:
    """Full weights, then adapters."""
    recipe = tiny.changed(tiny.tiny_recipe(), "rpo.peft", {"r": 2, "between_stages": "keep"})
    path = tiny.write_recipe(tmp_path, recipe)
    code, text = in_terminal("run", str(path), "--run-dir", str(tmp_path / "run"), "--no-report")
    lines = lines_of(text)
    assert code == 0, text
    assert foreign(lines) == []
    # A path is printed whole, to be copied; how long it is depends on where the tests run.
    others = [line for line in lines if str(tmp_path) not in line]
    assert [line for line in others if len(line) > COLUMNS] == []
    held_out = [line for line in lines if line.startswith("[1/5 code] held-out at step ")]
    assert [line.split()[5:7] for line in held_out] == [["0/6:", "loss"], ["6/6:", "loss"]]
    bars = [line for line in lines if _BAR.search(line)]
    assert [line for line in bars for bar in _BAR.finditer(line) if len(bar[0]) < 22] == []
    assert any(re.search(rf"step \d/3, {_TIME} left$", line) for line in bars)
    assert any(re.search(rf"stage 5/5, {_TIME} left$", line) for line in bars)
    assert sum("[5/5 rpo-2] same data as rpo-1" in line for line in lines) == 1
    assert not any("[5/5 rpo-2] data:" in line for line in lines)


@pytest.mark.slow
def test_a_resumed_run_in_a_terminal(finished_copy: Path) -> None:
    unfinished(finished_copy, "rpo-2")
    recipe = finished_copy.parent / "recipe.yaml"
    code, text = in_terminal("run", str(recipe), "--run-dir", str(finished_copy), "--no-report")
    lines = lines_of(text)
    assert code == 0, text
    assert any("[5/5 rpo-2] resuming from step 3" in line for line in lines)
    assert foreign(lines) == []


@pytest.mark.slow
def test_a_run_in_a_pipe(finished_copy: Path) -> None:
    """Plain lines: no control characters, a line for each logging step and each evaluation."""
    shutil.rmtree(finished_copy / "rpo-2")
    unfinished_dir = tiny.cut_before(finished_copy, finished_copy.parent / "cut", "dpo")
    changed = tiny.changed(tiny.tiny_recipe(), "dpo.eval_steps", 2)
    tiny.stage_of(changed, "dpo")["data"]["eval_fraction"] = 0.25
    recipe = tiny.write_recipe(finished_copy.parent, changed)
    done = subprocess.run(
        [
            sys.executable, "-m", "rpo_trainer", "dpo", str(recipe), "--run-dir",
            str(unfinished_dir),
        ],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert foreign(lines) == []
    steps = [line for line in lines if line.startswith("[3/5 dpo] step ")]
    assert [line.split()[3] for line in steps] == ["1/3", "2/3", "3/3"]
    assert re.search(rf"  {_TIME} left  chain {_TIME} left$", steps[0])
    held_out = [line for line in lines if line.startswith("[3/5 dpo] held-out at step ")]
    assert [line.split()[5] for line in held_out] == ["0/3:", "2/3:", "3/3:"]
    figures = re.compile(
        r": loss [\d.]+, gap -?[\de.-]+, pair accuracy [\d.]+, Δchosen -?[\de.-]+$"
    )
    assert [line for line in held_out if not figures.search(line)] == []
