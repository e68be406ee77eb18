"""The time left of a chain, from finished stages and planned steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.chain import time_left
from rpo_trainer.chain.time_left import TimeLeft


def stage(name: str, kind: str, steps: int | None = None, batch: int = 10) -> Any:
    return SimpleNamespace(name=name, kind=kind, max_steps=steps, global_batch_size=batch)


CHAIN = [
    stage("sft", "sft", 100),
    stage("dpo", "dpo"),
    stage("rpo-1", "rpo"),
    stage("rpo-2", "rpo"),
]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(value=0.0)
    monkeypatch.setattr(time_left, "time", SimpleNamespace(monotonic=lambda: clock.value))
    return clock


def test_unknown_before_anything_is_measured(now: Any) -> None:
    left = TimeLeft(CHAIN, {"dpo": 10, "rpo-1": 20, "rpo-2": 20})
    assert left.of_chain() is None
    left.begin("sft")
    assert left.of_chain() is None and left.of_training() is None


def test_the_first_stage_gives_the_rate_of_all(now: Any) -> None:
    left = TimeLeft(CHAIN, {"dpo": 10, "rpo-1": 20, "rpo-2": 20})
    left.begin("sft")
    now.value = 5
    left.step_begins(0)
    now.value = 25
    left.step_ended(10, 100)
    # 2 s per step of 10 examples: 90 steps here, 50 later.
    assert left.of_training() == 180
    assert left.of_chain() == 180 + 100
    now.value = 35  # ten seconds without a step
    assert left.of_chain() == 170 + 100


def test_finished_stages_of_the_same_kind_count(now: Any) -> None:
    left = TimeLeft(CHAIN, {"dpo": 10, "rpo-1": 20, "rpo-2": 40})
    left.end("sft", steps=100, seconds=100)
    left.end("dpo", steps=10, seconds=50)
    left.end("rpo-1", steps=20, seconds=60)
    assert left.of_chain() == 120  # as many seconds per step as rpo-1
    left.begin("rpo-2")
    now.value = 30
    assert left.of_chain() == 90


def test_evaluation_after_training_counts(now: Any) -> None:
    chain = [stage("one", "sft", 10), stage("two", "sft", 10)]
    left = TimeLeft(chain, {})
    left.begin("one")
    left.step_begins(0)
    now.value = 10
    left.step_ended(10, 10)
    now.value = 40  # evaluated for 30 s
    left.end("one", steps=10, seconds=40)
    left.begin("two")
    left.step_begins(0)
    now.value = 45
    left.step_ended(5, 10)
    assert left.of_chain() == 5 + 30


def test_a_stage_without_planned_steps_leaves_it_unknown(now: Any) -> None:
    left = TimeLeft(CHAIN, {})
    left.end("sft", steps=100, seconds=100)
    assert left.of_chain() is None


def test_a_stage_that_is_not_run_takes_no_time(now: Any) -> None:
    left = TimeLeft(CHAIN[:2], {"dpo": 10})
    left.end("dpo", steps=None, seconds=None)
    left.end("sft", steps=100, seconds=100)
    assert left.of_chain() == 0
