"""`status --watch`: refreshed until the run ends; without a terminal, one line per change."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpo_trainer.chain.run_dir import locked
from rpo_trainer.cli import watch
from rpo_trainer.runtime.lock_holder import HOLDER_FILE, is_running
from tests.cli.helpers import call


def write_chain(run_dir: Path, state: str, steps: int) -> None:
    run_dir.mkdir(exist_ok=True)
    stage = {"name": "code", "kind": "sft", "state": state, "spec": {}, "init": "model"}
    chain = {"version": 1, "model": {}, "seed": 0, "stages": [stage]}
    (run_dir / "chain.json").write_text(json.dumps(chain))
    rows = [{"stage": "code", "step": step, "loss": 1.0 / step} for step in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def at_each_pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[None]], list[float]]:
    """Advance a generator each time the watch would sleep."""

    def install(events: Iterator[None]) -> list[float]:
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            next(events, None)

        monkeypatch.setattr(watch.time, "sleep", sleep)
        return pauses

    return install


def test_lines_until_the_run_is_finished(
    tmp_path: Path,
    at_each_pause: Callable[[Iterator[None]], list[float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def events() -> Iterator[None]:
        write_chain(tmp_path / "run", "running", 2)
        yield
        yield  # nothing new
        write_chain(tmp_path / "run", "done", 4)
        yield

    write_chain(tmp_path / "run", "running", 1)
    with locked(tmp_path / "run"):
        pauses = at_each_pause(events())
        assert call("status", tmp_path / "run", "--watch", "--interval", "0.5") == 0
    assert pauses == [0.5, 0.5, 0.5]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == "finished"
    for line, step in zip(lines, ("step 1", "step 2", "step 4"), strict=False):
        assert "code: " in line and step in line


@pytest.mark.parametrize("state", ["running", "pending"])
def test_a_run_that_nothing_works_on_is_shown_once(
    state: str,
    tmp_path: Path,
    at_each_pause: Callable[[Iterator[None]], list[float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_chain(tmp_path / "run", state, 1)
    pauses = at_each_pause(iter(()))
    assert call("status", tmp_path / "run", "--watch") == 0
    assert not pauses and "not running" in capsys.readouterr().out


def test_control_c_ends_the_watch_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    write_chain(tmp_path / "run", "running", 1)
    with locked(tmp_path / "run"):
        assert call("status", tmp_path / "run", "--watch") == 0
    assert "stopped" not in capsys.readouterr().err


def test_the_table_is_refreshed_in_a_terminal(
    tmp_path: Path,
    at_each_pause: Callable[[Iterator[None]], list[float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def events() -> Iterator[None]:
        write_chain(tmp_path / "run", "done", 3)
        yield

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    write_chain(tmp_path / "run", "running", 1)
    with locked(tmp_path / "run"):
        pauses = at_each_pause(events())
        assert call("status", tmp_path / "run", "--watch") == 0
    assert pauses == [5.0]
    assert capsys.readouterr().out.rstrip().endswith("finished")


def test_who_is_running(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with locked(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    holder, host = tmp_path / HOLDER_FILE, socket.gethostname()
    for text, running in (
        (f"process {os.getpid()} on {host}", True),
        (f"process {2**22 + 1} on {host}", False),
        (f"process {2**22 + 1} on another-host", True),
        (f"process {10**30} on {host}", True),
        ("nonsense", False),
    ):
        holder.write_text(text)
        assert is_running(tmp_path) == running, text
