"""Several processes yield the same results, order, counts and errors as one."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from rpo_trainer.data import Audit, tokenize, tokenize_rows
from rpo_trainer.data import parallel_map as module
from rpo_trainer.data.parallel_map import map_batches, processes_for
from rpo_trainer.errors import DataError, Problems
from tests.conftest import Injected
from tests.raising import raises, with_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux alone")


def square(numbers: list[int]) -> list[int]:
    return [n * n for n in numbers]


def where(_: int) -> int:
    return os.getpid()


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


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_examples_and_counts(chatml: Any, processes: int) -> None:
    given = rows(100)
    alone, counts = tokenized(given, chatml, 1)
    several, others = tokenized(given, chatml, processes)
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
    for processes in (1, 3):
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
    assert list(map_batches(square, batches, 3)) == [square(batch) for batch in batches]
    assert os.getpid() not in set(map_batches(where, range(20), 2))
    assert set(map_batches(where, range(20), 1)) == {os.getpid()}


def test_a_killed_process_loses_no_batch(
    caplog: pytest.LogCaptureFixture, injected: Injected
) -> None:
    parent = os.getpid()

    def work(number: int) -> int:
        if number == 5 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * 10

    assert list(map_batches(work, range(12), 2)) == [10 * n for n in range(12)]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "rpo_trainer.data.parallel_map"
    injected("SIGKILL of a process that tokenizes", "survived")


def test_signals_are_for_the_parent() -> None:
    def handlers(_: int) -> tuple[Any, Any]:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    mine = handlers(0)
    found = list(map_batches(handlers, range(4), 2))
    assert set(found) == {(signal.SIG_IGN, signal.SIG_DFL)}
    assert handlers(0) == mine


def test_how_many_processes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert [processes_for(n) for n in (0, 1, 7, 8, 40, 1000)] == [1, 1, 1, 2, 10, module.MOST]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes_for(1000) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert processes_for(1000) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes_for(1000) == 1
