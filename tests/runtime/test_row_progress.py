"""Progress of work on rows: a bar in a terminal, log lines elsewhere, a display of the caller's choice."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.runtime import row_progress, terminal
from rpo_trainer.runtime.row_progress import RowProgress, duration, shown_in


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that only tests advance."""
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(row_progress, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


@pytest.fixture(autouse=True)
def terminal_of_100_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    terminal.console.cache_clear()
    yield
    terminal.console.cache_clear()


def work(bar: RowProgress, clock: Any, steps: int, seconds: float, rows: int) -> None:
    for _ in range(steps):
        clock.value += seconds
        bar.advance(rows)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (187, "03:07"), (3787, "1:03:07")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("total", "earlier", "seconds", "rows", "text"),
    [
        (1000, 0, 10.0, 250, "250 of 1,000 rows, 25 rows/s, 00:30 left"),
        (None, 0, 2.0, 6000, "6,000 rows, 3,000 rows/s"),
        # The rate is of this process: 100 rows in 10 s, not 600.
        (1000, 500, 10.0, 100, "600 of 1,000 rows, 10 rows/s, 00:40 left"),
        (100, 0, 10.0, 100, "100 of 100 rows, 10 rows/s"),
        (100, 0, 40.0, 10, "10 of 100 rows, 0.25 rows/s, 06:00 left"),
        (100, 40, 10.0, 0, "40 of 100 rows"),
    ],
)
def test_the_state(
    total: int | None, earlier: int, seconds: float, rows: int, text: str, clock: Any
) -> None:
    bar = RowProgress(total, "reading", done=earlier)
    clock.value += seconds
    bar.advance(rows)
    assert bar.state() == text


def test_without_a_terminal_a_line_every_15_seconds_and_one_at_the_end(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with redirect_stderr(io.StringIO()) as screen, RowProgress(100, "reading") as bar:
        work(bar, clock, 100, 0.4, 1)  # 40 s
    assert caplog.messages == [
        "reading: 38 of 100 rows, 2.5 rows/s, 00:25 left",
        "reading: 76 of 100 rows, 2.5 rows/s, 00:10 left",
        "reading: 100 of 100 rows, 2.5 rows/s",
    ]
    assert screen.getvalue() == ""


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()])
def test_short_work_shows_nothing(
    screen: io.StringIO, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with redirect_stderr(screen), RowProgress(9, "reading") as bar:
        work(bar, clock, 9, 0.11, 1)
    assert screen.getvalue() == "" and caplog.messages == []


def test_in_a_terminal_a_bar_that_is_removed_at_the_end(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with redirect_stderr(Terminal()) as screen:
        with RowProgress(1000, "[1/3 sft] reading") as bar:
            work(bar, clock, 30, 1.0, 10)
            with RowProgress(10, "inner") as inner:  # a terminal has room for one bar
                work(inner, clock, 10, 1.0, 1)
        assert not row_progress._bar_shown
    shown = screen.getvalue()
    assert "[1/3 sft] reading" in shown and "300 of 1,000 rows, 10 rows/s, 01:10 left" in shown
    assert "inner" not in shown and caplog.messages == []
    assert shown.endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()])
def test_other_ranks_show_nothing(
    screen: io.StringIO, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    texts: list[str] = []
    with redirect_stderr(screen), RowProgress(100, "reading", show=False) as bar:
        work(bar, clock, 10, 20.0, 1)
        with shown_in(texts.append):
            work(bar, clock, 10, 20.0, 1)
    assert screen.getvalue() == "" and caplog.messages == [] and texts == []
    assert bar.done == 20


def test_a_display_replaces_bar_and_lines(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    texts: list[str] = []
    with (
        redirect_stderr(Terminal()) as screen,
        shown_in(texts.append),
        RowProgress(4, "reading") as bar,
    ):
        work(bar, clock, 2, 20.0, 1)
    assert texts == [
        "reading: 1 of 4 rows, 0.05 rows/s, 01:00 left",
        "reading: 2 of 4 rows, 0.05 rows/s, 00:40 left",
        "",
    ]
    assert screen.getvalue() == "" and caplog.messages == []


def test_an_error_removes_the_bar_and_logs_no_end(
    clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def fail() -> None:
        with RowProgress(100, "reading") as bar:
            work(bar, clock, 2, 10.0, 1)
            raise ValueError

    for screen in (Terminal(), io.StringIO()):
        with redirect_stderr(screen), pytest.raises(ValueError):  # noqa: PT011
            fail()
        assert not row_progress._bar_shown
    assert caplog.messages == ["reading: 2 of 100 rows, 0.1 rows/s, 16:20 left"]
