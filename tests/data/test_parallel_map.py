"""Several processes yield the same results, order, counts and errors as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, tokenize, tokenize_rows
from rpo_trainer.data import parallel_map as module
from rpo_trainer.data.parallel_map import map_batches, processes_for
from rpo_trainer.errors import DataError, Problems
from rpo_trainer.runtime import cores
from tests.conftest import Injected
from tests.data import parallel_work as work
from tests.raising import raises, with_code

ROOT = Path(__file__).parents[2]


def rows(n: int, **bad: Any) -> list[dict[str, Any]]:
    """Rows of which every fifth is dropped, every seventh has a warning, and every third is longer."""
    found = []
    for i in range(n):
        answer = "" if i % 5 == 0 else f"answer {i} " * (1 + i % 3)
        if i % 7 == 0:
            answer += "<|im_end|>"
        messages = [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": answer}]
        found.append({"id": f"r{i}", "source": "s", "messages": messages})
    return found


def tokenized(given: list[Any], tokenizer: Any, processes: int) -> tuple[Any, Audit]:
    audit = Audit()
    data = tokenize_rows(
        given, tokenizer, kind="sft", max_length=60, truncation="drop", audit=audit,
        processes=processes,
    )  # fmt: skip
    return data, audit


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH", 7)


def test_the_same_examples_and_counts(chatml: Any) -> None:
    given = rows(100)
    alone, counts = tokenized(given, chatml, 1)
    several, others = tokenized(given, chatml, 3)
    assert several.to_list() == alone.to_list()
    assert others.as_dict() == counts.as_dict()
    assert others.summary_lines() == counts.summary_lines()
    assert counts.dropped["empty_response"].as_dict() == {
        "count": 17,  # of 20, without those with special-token text
        "examples": ["r5", "r10", "r15"],
    }


def test_the_same_errors(chatml: Any) -> None:
    given = rows(100)
    for i in (3, 60):
        given[i]["messages"][1]["content"] = chr(0xF0000)
    given[61]["messages"][1]["tool_calls"] = [{"arguments": {}}]
    messages = []
    for processes in (1, 2):
        with pytest.raises(Problems) as error:
            tokenized(given, chatml, processes)
        messages.append(str(error.value))
        private = with_code(error.value, "data.private-use-characters")
        assert private.details == {"rows": ["r3", "r60"], "of": 100}
        assert with_code(error.value, "template.unwritten-tool-calls").details["rows"] == ["r61"]
    assert messages[0] == messages[1]


def test_an_error_of_the_work_is_raised_unchanged(plain_text: Any) -> None:
    """All parts of an error survive the process boundary."""
    found = []
    for processes in (1, 2):
        with raises("template.missing", DataError, where="model.chat_template") as error:
            tokenized(rows(50), plain_text, processes)
        found.append(vars(error.value))
    assert found[0] == found[1]


def test_order_and_where_the_work_is_done() -> None:
    batches = [[i, i + 1] for i in range(20)]
    assert list(map_batches(work.square, batches, 3)) == [work.square(batch) for batch in batches]
    assert os.getpid() not in set(map_batches(work.where, range(20), 2))
    assert set(map_batches(work.where, range(20), 1)) == {os.getpid()}


def test_a_killed_process_loses_no_batch(
    caplog: pytest.LogCaptureFixture, injected: Injected
) -> None:
    found = map_batches(work.Killed(os.getpid()), range(12), 2)
    assert list(found) == [10 * n for n in range(12)]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "rpo_trainer.data.parallel_map"
    injected("SIGKILL of a process that tokenizes", "survived")


def test_a_tokenizer_that_cannot_be_pickled(caplog: pytest.LogCaptureFixture) -> None:
    lock = threading.Lock()

    def locked(number: int) -> tuple[int, int]:
        with lock:
            return number, os.getpid()

    assert list(map_batches(locked, range(3), 2)) == [(n, os.getpid()) for n in range(3)]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "rpo_trainer.data.parallel_map"


def test_signals_are_for_the_parent() -> None:
    mine = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    found = list(map_batches(work.handlers, range(4), 2))
    assert set(found) == {(signal.SIG_IGN, signal.SIG_DFL, "false")}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == mine


def test_few_batches_are_held_at_once() -> None:
    read = 0

    def batches() -> Iterator[list[int]]:
        nonlocal read
        for read in range(1, 21):
            yield [read]

    ahead = []
    for number, _ in enumerate(map_batches(work.square, batches(), 2), 1):
        ahead.append(read - number)
    assert max(ahead) == 3  # processes + 1


SCRIPT = """
import os, signal, sys, threading
from pathlib import Path
from rpo_trainer.data.parallel_map import map_batches
from tests.data import parallel_work as work

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs that ignore it
print("started", flush=True)
if sys.argv[1] == "map":
    found = list(map_batches(work.square, [[1], [2], [3]], 2))
    assert found == [[1], [4], [9]], found
else:
    list(map_batches(work.Recorded(Path(sys.argv[2])), range(4), 2))
"""


def script(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, str(path), *arguments], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """The processes do not run the script: it would print twice, and start processes without end."""
    process = script(tmp_path, "map")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "started\n"), error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(
    tmp_path: Path, number: signal.Signals, injected: Injected
) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()
    process = script(tmp_path, "block", str(folder))
    until(lambda: len([*folder.iterdir()]) == 2)
    workers = [int(path.name) for path in folder.iterdir()]
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    until(lambda: not any(map(alive, workers)))
    if number == signal.SIGKILL:
        injected("SIGKILL of the parent of processes that tokenize", "survived")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_how_many_processes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: 64)
    monkeypatch.setattr(cores, "_quotas", lambda: [])
    each = module.ROWS_EACH
    found = [processes_for(n) for n in (0, 1, 2 * each - 1, 2 * each, 10 * each, 1000 * each)]
    assert found == [1, 1, 1, 2, 10, module.MOST]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes_for(1000 * each) == 8
    assert processes_for(1000 * each, alone=True) == module.MOST
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert processes_for(1000 * each) == 1
