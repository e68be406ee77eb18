"""Progress of a chain: bars in a terminal, plain lines elsewhere, none on other ranks."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.chain import progress, time_left
from rpo_trainer.chain.progress import ChainProgress, StageProgress
from rpo_trainer.chain.time_left import TimeLeft
from rpo_trainer.runtime import row_progress, terminal
from rpo_trainer.runtime.row_progress import RowProgress

ARGS = SimpleNamespace(examples_per_step=lambda: 32)
LOGS = {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "grad_norm": 1}
HELD_OUT = {"eval_loss": 0.61234, "eval_rewards/accuracies": 0.75, "eval_runtime": 1, "epoch": 1}
HELD_OUT_LINE = "[3/6 stage-3] held-out at step 20/40: loss 0.6123, pair accuracy 0.75"
KINDS = ("sft", "sft", "dpo", "rpo", "rpo", "rpo")
STAGES: list[Any] = [
    SimpleNamespace(name=f"stage-{n}", kind=kind, max_steps=40, global_batch_size=32)
    for n, kind in enumerate(KINDS, 1)
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that only tests advance."""
    now = SimpleNamespace(value=100.0)
    fake = SimpleNamespace(monotonic=lambda: now.value)
    monkeypatch.setattr(progress, "time", fake)
    monkeypatch.setattr(time_left, "time", fake)
    return now


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    terminal.console.cache_clear()
    yield
    terminal.console.cache_clear()


def state(step: int, first_rank: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=40, is_world_process_zero=first_rank)


def chain_at(number: int) -> ChainProgress:
    return ChainProgress(len(STAGES), TimeLeft(STAGES[number - 1 :], {}))


def train(callback: StageProgress, clock: Any, first_rank: bool = True) -> None:
    """Resumed at step 10; ten steps of half a second, then a log line."""
    callback.on_train_begin(ARGS, state(10, first_rank), None)
    clock.value += 60  # an evaluation before the first step is not a step
    callback.on_step_begin(ARGS, state(10, first_rank), None)
    for step in range(11, 21):
        clock.value += 0.5
        callback.on_step_end(ARGS, state(step, first_rank), None)
        callback.on_step_begin(ARGS, state(step, first_rank), None)
    callback.on_log(ARGS, state(20, first_rank), None, logs=LOGS)
    callback.on_log(ARGS, state(20, first_rank), None, logs=HELD_OUT)
    callback.on_log(ARGS, state(20, first_rank), None, logs={"train_runtime": 1, "loss": 2})


def test_without_a_terminal_it_is_plain_lines(caplog: pytest.LogCaptureFixture, clock: Any) -> None:
    caplog.set_level(logging.INFO)
    chain = chain_at(3)
    with chain.shown():
        chain.begin(3, "stage-3")
        train(chain.callback("[3/6 stage-3]"), clock)
    # Two steps a second of 32 examples; 20 steps are left, and 3 stages of 40.
    line = (
        "[3/6 stage-3] step 20/40  loss 0.5  gap 0.25  acc 0.75  64 examples/s  00:10 left"
        "  chain 01:10 left"
    )
    assert caplog.messages == [line, HELD_OUT_LINE]


def test_in_a_terminal_it_is_two_bars_that_fit_80_columns(
    caplog: pytest.LogCaptureFixture, clock: Any
) -> None:
    caplog.set_level(logging.INFO)
    chain, screen = chain_at(3), Terminal()
    with redirect_stderr(screen), chain.shown():
        chain.begin(3, "stage-3")
        callback = chain.callback("[3/6 stage-3]")
        train(callback, clock)
        lines = terminal.console().render_lines(chain.render())
        texts = ["".join(part.text for part in line) for line in lines]
        callback.on_train_end(ARGS, state(40), None)
    assert all(len(text) == 80 for text in texts)
    stage, whole, figures = (text.rstrip() for text in texts)
    assert re.fullmatch(r"stage-3 \S{40,} step 20/40, 00:10 left", stage)
    assert re.fullmatch(r"chain   \S{40,} stage 3/6, 01:10 left", whole)
    assert figures == "loss 0.5  gap 0.25  acc 0.75  64 ex/s"
    assert "step 20/40, 00:10 left" in screen.getvalue()
    assert caplog.messages == [HELD_OUT_LINE]


@pytest.mark.parametrize("name", ["a", "a-very-long-name-of-a-stage-that-somebody-has-chosen"])
@pytest.mark.parametrize("steps", [1, 1_000_000])
def test_the_bar_keeps_a_third_of_80_columns(name: str, steps: int, clock: Any) -> None:
    stage: Any = SimpleNamespace(name=name, kind="sft", max_steps=steps, global_batch_size=1)
    chain = ChainProgress(1, TimeLeft([stage], {}))
    with redirect_stderr(Terminal()), chain.shown():
        chain.begin(1, name)
        chain.callback("").on_step_begin(ARGS, state(0), None)
        clock.value += 10
        chain.time_left.step_ended(1, steps)
        chain.step(1, steps)
        lines = terminal.console().render_lines(chain.render())
        text = "".join(part.text for part in lines[0])
    assert len(re.findall("[━╸╺]", text)) >= 22 and len(text) == 80


@pytest.mark.parametrize("why", ["no columns", "dumb"])
def test_a_terminal_that_cannot_redraw_gets_lines(
    why: str, caplog: pytest.LogCaptureFixture, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    chain, screen = chain_at(3), Terminal()
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        size = SimpleNamespace(columns=0)
        monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: size)
        monkeypatch.setattr(screen, "fileno", lambda: 2)
    with redirect_stderr(screen), chain.shown():
        chain.begin(3, "stage-3")
        train(chain.callback("[3/6 stage-3]"), clock)
    assert len(caplog.messages) == 2 and screen.getvalue() == ""


def test_lines_of_every_library_go_above_the_bars(clock: Any) -> None:
    """Handlers that hold the stream itself, like those of libraries, and plain prints."""
    other, screen = logging.getLogger("some_library"), Terminal()
    handler = logging.StreamHandler(screen)
    other.addHandler(handler)
    try:
        with redirect_stderr(screen):
            chain = chain_at(3)
            with chain.shown():
                chain.begin(3, "stage-3")
                start = len(screen.getvalue())
                other.warning("a line of a library")
                print("a printed line", file=progress.sys.stderr)
                drawn = screen.getvalue()[start:]
            other.warning("after the bars")
    finally:
        other.removeHandler(handler)
    # Each starts in the first column: the display is erased before it, and drawn again below it.
    for line in ("a line of a library", "a printed line"):
        before, after = drawn.split(line)
        assert before.endswith(("\x1b[2K", "\r", "\n")) or re.search(r"\x1b\[\dK$", before), before
        assert "chain" in after
    assert screen.getvalue().endswith("after the bars\n") and handler.stream is screen


def test_an_error_in_training_ends_the_display(clock: Any) -> None:
    chain = chain_at(3)
    before = progress.sys.stderr

    def broken() -> None:
        with redirect_stderr(Terminal()), chain.shown():
            chain.begin(3, "stage-3")
            train(chain.callback("[3/6 stage-3]"), clock)
            raise ValueError("the loss is not finite")

    with pytest.raises(ValueError, match="loss"):
        broken()
    assert chain.live is None and progress.sys.stderr is before


def test_other_ranks_are_quiet(
    caplog: pytest.LogCaptureFixture, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress.distributed, "is_main", lambda: False)
    chain, screen = chain_at(3), Terminal()
    with redirect_stderr(screen), chain.shown():
        chain.begin(3, "stage-3")
        train(chain.callback("[3/6 stage-3]"), clock, first_rank=False)
    assert screen.getvalue() == "" and caplog.messages == []


def test_work_on_rows_is_a_line_below_the_bars(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_progress, "time", SimpleNamespace(monotonic=lambda: clock.value))
    chain, screen = chain_at(3), Terminal()

    def lines() -> list[str]:
        found = terminal.console().render_lines(chain.render())
        return ["".join(part.text for part in line).rstrip() for line in found]

    with redirect_stderr(screen), chain.shown():
        for begin, above in ((lambda: None, 1), (lambda: chain.begin(3, "stage-3"), 2)):
            begin()
            with RowProgress(300, "tokenizing") as bar:
                clock.value += 10
                bar.advance(100)
                assert lines()[above:] == ["tokenizing: 100 of 300 rows, 10 rows/s, 00:20 left"]
            assert len(lines()) == above
    assert "tokenizing" in screen.getvalue()


def test_the_chain_does_not_move_back_while_a_stage_is_evaluated(clock: Any) -> None:
    chain = chain_at(3)

    def filled() -> int:
        """Number of filled columns of the chain's bar."""
        bar = [p for p in terminal.console().render_lines(chain.render())[1] if "━" in p.text]
        return len(bar[0].text)

    with redirect_stderr(Terminal()), chain.shown():
        chain.begin(3, "stage-3")
        callback = chain.callback("")
        train(callback, clock)
        callback.on_train_end(ARGS, state(40), None)
        chain.step(40, 40)
        chain.phase("evaluating")
        evaluating = filled()
        chain.begin(4, "stage-4")
        assert evaluating == pytest.approx(filled(), abs=3) and evaluating > 20


def test_a_single_stage_has_one_bar(clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chain = ChainProgress(1, TimeLeft(STAGES[:1], {}))
    with redirect_stderr(Terminal()), chain.shown():
        chain.begin(1, "stage-1")
        assert len(terminal.console().render_lines(chain.render())) == 1
    chain = ChainProgress(1, TimeLeft(STAGES[:1], {}))
    chain.begin(1, "stage-1")
    train(chain.callback("[1/1 stage-1]"), clock)
    assert "left" in caplog.messages[0]
    assert not any("chain" in message for message in caplog.messages)
