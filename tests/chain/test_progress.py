"""Progress of a chain: bars in a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io
import logging
import re
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.chain import progress
from rpo_trainer.chain.progress import ChainProgress, StageProgress

ARGS = SimpleNamespace(examples_per_step=lambda: 32)
LOGS = {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "grad_norm": 1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Seconds pass when a test says so."""
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.value))
    return now


def state(step: int, first_rank: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=40, is_world_process_zero=first_rank)


def train(callback: StageProgress, clock: Any, first_rank: bool = True) -> None:
    """Resumed at step 10; ten steps of half a second, then a log line."""
    callback.on_train_begin(ARGS, state(10, first_rank), None)
    clock.value += 60  # an evaluation before the first step is no step
    callback.on_step_begin(ARGS, state(10, first_rank), None)
    for step in range(11, 21):
        clock.value += 0.5
        callback.on_step_end(ARGS, state(step, first_rank), None)
        callback.on_step_begin(ARGS, state(step, first_rank), None)
    callback.on_log(ARGS, state(20, first_rank), None, logs=LOGS)
    callback.on_log(ARGS, state(20, first_rank), None, logs={"eval_loss": 0.5})
    callback.on_log(ARGS, state(20, first_rank), None, logs={"train_runtime": 1, "loss": 2})


def test_without_a_terminal_it_is_plain_lines(caplog: pytest.LogCaptureFixture, clock: Any) -> None:
    caplog.set_level(logging.INFO)
    chain = ChainProgress(6)
    with chain.shown():
        train(chain.callback("[3/6 dpo]", 3), clock)
    # Two steps a second of 32 examples, and 20 steps are left.
    line = "[3/6 dpo] step 20/40  loss 0.5  margin 0.25  acc 0.75  64 examples/s  00:10 left"
    assert caplog.messages == [line]


def test_in_a_terminal_it_is_two_bars(caplog: pytest.LogCaptureFixture, clock: Any) -> None:
    caplog.set_level(logging.INFO)
    chain, terminal = ChainProgress(6), Terminal()
    with redirect_stderr(terminal), chain.shown():
        callback = chain.callback("[3/6 dpo]", 3)
        train(callback, clock)
        assert (chain.stage_bar.n, chain.stage_bar.total) == (20, 40)
        assert (chain.bar.n, chain.bar.total) == (2.5, 6)
        chain.stage_bar.refresh()
        callback.on_train_end(ARGS, state(40), None)
        assert chain.stage_bar is None
    shown = terminal.getvalue()
    assert re.search(r"chain, stage 3 of 6  42% \|", shown)
    assert re.search(r"\[3/6 dpo\]  50% \|.*step 20/40, \S+ left", shown)
    assert "loss 0.5  margin 0.25  acc 0.75  64 examples/s" in shown
    assert caplog.messages == []


def test_a_terminal_without_width_gets_lines(
    caplog: pytest.LogCaptureFixture, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: SimpleNamespace(columns=0))
    chain, terminal = ChainProgress(6), Terminal()
    monkeypatch.setattr(terminal, "fileno", lambda: 2)
    with redirect_stderr(terminal), chain.shown():
        train(chain.callback("[3/6 dpo]", 3), clock)
    assert len(caplog.messages) == 1 and terminal.getvalue() == ""


def test_messages_go_above_the_bars_and_the_handlers_come_back() -> None:
    package, terminal = logging.getLogger("rpo_trainer"), Terminal()
    before, level = package.handlers, package.level
    own = logging.StreamHandler(terminal)
    package.handlers, package.level = [own], logging.INFO
    try:
        with redirect_stderr(terminal), ChainProgress(6).shown():
            package.info("a message")
            assert own not in package.handlers
        assert package.handlers == [own]
    finally:
        package.handlers, package.level = before, level
    assert re.search(r"(^|\r|\n) *a message\n", terminal.getvalue())


def test_an_error_in_training_leaves_no_bar_open(clock: Any) -> None:
    chain = ChainProgress(6)

    def broken() -> None:
        with redirect_stderr(Terminal()), chain.shown():
            train(chain.callback("[3/6 dpo]", 3), clock)
            raise ValueError("the loss is not finite")

    with pytest.raises(ValueError, match="loss"):
        broken()
    assert chain.bar is None and chain.stage_bar is None


def test_other_ranks_are_quiet(
    caplog: pytest.LogCaptureFixture, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress.distributed, "is_main", lambda: False)
    chain, terminal = ChainProgress(6), Terminal()
    with redirect_stderr(terminal), chain.shown():
        train(chain.callback("[3/6 dpo]", 3), clock, first_rank=False)
    assert terminal.getvalue() == "" and caplog.messages == []
