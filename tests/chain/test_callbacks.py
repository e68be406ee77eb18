"""Signals and metrics of a stage during training."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from rpo_trainer.chain.callbacks import MetricsLog, StepZeroLog
from rpo_trainer.chain.stop_signal import StopOnSignal
from rpo_trainer.errors import StoppedBySignal
from rpo_trainer.stages.record import StepZeroRecord
from tests.raising import raises


def state(step: int = 1, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=4, is_world_process_zero=True, **fields)


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_outside_of_training_the_first_signal_ends_the_run() -> None:
    stop = StopOnSignal()
    with stop.installed(), raises("run.stopped-by-signal", StoppedBySignal) as error:
        send()
    assert error.value.exit_code == 75 and "SIGTERM" in error.value.what


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_training_the_step_is_finished_and_saved(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    stop, control = StopOnSignal(), TrainerControl()
    with stop.installed():
        stop.on_train_begin(None, state(), control)
        stop.on_step_end(None, state(), control)
        assert not control.should_save and not control.should_training_stop
        send(number)
        (warned,) = caplog.records
        assert warned.levelname == "WARNING" and number.name in warned.getMessage()
        stop.on_step_end(None, state(), control)
        assert control.should_save and control.should_training_stop
        with raises("run.stopped-by-signal", StoppedBySignal) as error:
            stop.output_written()
        assert number.name in error.value.what


def test_a_second_signal_ends_it_at_once() -> None:
    stop = StopOnSignal()
    with stop.installed():
        stop.on_train_begin(None, state(), TrainerControl())
        send()
        with raises("run.stopped-by-signal", StoppedBySignal) as error:
            send(signal.SIGINT)
        assert "SIGINT" in error.value.what


def test_after_the_output_signals_end_the_run_again() -> None:
    stop = StopOnSignal()
    with stop.installed():
        stop.on_train_begin(None, state(), TrainerControl())
        stop.output_written()
        assert not stop.busy
        with pytest.raises(StoppedBySignal):
            send()


def test_a_signal_whose_error_was_swallowed_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Noisy:
        def __del__(self) -> None:  # errors in finalizers are only printed
            send()

    stop = StopOnSignal()
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with stop.installed():
        noisy = Noisy()
        del noisy
        assert stop.received is signal.SIGTERM
        with pytest.raises(StoppedBySignal):
            stop.on_train_begin(None, state(), TrainerControl())


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    stop = StopOnSignal()
    with stop.installed():
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    with pytest.raises(StoppedBySignal), stop.installed():
        send()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_loaders_worker_leaves_signals_to_its_parent() -> None:
    stop = StopOnSignal()
    stop._process = os.getpid() + 1  # as in a forked process
    with stop.installed():
        send()
    assert stop.received is None


def test_other_threads_run_without_handlers() -> None:
    entered = []

    def work() -> None:
        with StopOnSignal().installed():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


def test_every_log_line_is_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "dpo")
    log.on_log(None, state(2), None, logs={"loss": 0.5, "rewards/margins": 1.0})
    log.on_log(None, state(4), None, logs={"eval_loss": float("nan")})
    log.on_log(None, state(4), None, logs={"train_runtime": 1.0, "train_loss": 0.5})
    log.on_log(None, state(4), None, logs=None)
    other_rank = state(4)
    other_rank.is_world_process_zero = False
    log.on_log(None, other_rank, None, logs={"loss": 0.1})
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {"stage": "dpo", "step": 2, "loss": 0.5, "rewards/margins": 1.0}
    assert second["stage"] == "dpo" and second["eval_loss"] != second["eval_loss"]


def test_the_step_zero_check_is_handed_on_once() -> None:
    noted: list[StepZeroRecord] = []
    trainer = SimpleNamespace()
    callback = StepZeroLog(trainer, noted.append)
    callback.on_step_end(None, state(1), None)
    assert noted == []
    trainer.step_zero = {"loss": 0.5, "expected": 0.5, "nats_per_token": 0.0}
    callback.on_step_end(None, state(1), None)
    callback.on_step_end(None, state(2), None)
    assert noted == [StepZeroRecord(**trainer.step_zero, ok=True)]
