"""Estimates the time left of a chain from its finished stages and planned steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpo_trainer.recipe import Stage


@dataclass(frozen=True)
class _Done:
    """A finished stage: its total seconds, and those after its last training step (`rest`)."""

    kind: str
    examples: float
    seconds: float
    rest: float | None = None


class TimeLeft:
    """Estimates the time left of a stage and of its chain.

    The cost of a stage is proportional to the examples of all its optimizer steps. The time per example,
    including sampling and evaluation, is that of the finished stages of the same kind; without any, that of
    all finished stages; before the first one is finished, that of the current stage's training.

    Args:
        stages: all stages of the chain, in order.
        planned: optimizer steps by stage, if known; read at each estimate.
    """

    def __init__(self, stages: Sequence[Stage], planned: Mapping[str, int]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.planned = planned
        self.waiting = [stage.name for stage in stages]
        self._done: list[_Done] = []
        self._current: Stage | None = None
        self._begun = 0.0  # when the current stage began
        self._first: tuple[float, int] | None = None  # time and number of its first step here
        # Time, steps done and steps planned at the last step.
        self._last: tuple[float, int, int] | None = None

    def begin(self, name: str) -> None:
        """Start or resume a stage."""
        self.waiting.remove(name)
        self._current, self._begun = self.stages[name], time.monotonic()
        self._first = self._last = None

    def step_begins(self, step: int) -> None:
        """Note the start of a step; the first one of a stage starts the measurement."""
        if self._first is None:
            self._first = time.monotonic(), step

    def step_ended(self, step: int, steps: int) -> None:
        """Note that `step` of `steps` optimizer steps of the current stage are done."""
        self._last = time.monotonic(), step, steps

    def end(self, name: str, *, steps: int | None, seconds: float | None) -> None:
        """Note that a stage is finished, in this or an earlier start, or is not run at all.

        Args:
            steps: its optimizer steps; None: not run.
            seconds: its duration over all starts of the run.
        """
        stage = self.stages[name]
        if name in self.waiting:
            self.waiting.remove(name)
        rest = None
        if self._current is stage and self._first is not None and self._last is not None:
            rest = time.monotonic() - self._last[0]
        if self._current is stage:
            self._current = None
        if steps and seconds is not None:
            self._done.append(_Done(stage.kind, steps * stage.global_batch_size, seconds, rest))

    def steps_a_second(self) -> float:
        """Return the current stage's speed in this process; 0 before a step is done."""
        if self._first is None or self._last is None:
            return 0.0
        seconds, steps = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return steps / seconds if seconds > 0 else 0.0

    def of_training(self) -> float | None:
        """Return the seconds left of the current stage's steps; None if unknown."""
        rate = self.steps_a_second()
        if self._last is None or not rate:
            return None
        _, step, steps = self._last
        return (steps - step) / rate

    def of_chain(self) -> float | None:
        """Return the seconds left of all stages; None if unknown."""
        parts = [self._stage(self.stages[name]) for name in self.waiting]
        if self._current is not None:
            parts.append(self._rest_of_current(self._current))
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _rest_of_current(self, stage: Stage) -> float | None:
        now = time.monotonic()
        training = self.of_training()
        if training is None:
            total = self._stage(stage)
            return None if total is None else max(0.0, total - (now - self._begun))
        assert self._last is not None
        rests = [done.rest for done in self._done if done.rest is not None]
        after = sum(rests) / len(rests) if rests else 0.0
        # Time also passes between two steps and after the last one.
        return max(0.0, training + after - (now - self._last[0]))

    def _stage(self, stage: Stage) -> float | None:
        """Estimate the seconds of an entire stage."""
        steps = stage.max_steps or self.planned.get(stage.name)
        if steps is None:
            return None
        examples = steps * stage.global_batch_size
        same_kind = [done for done in self._done if done.kind == stage.kind] or self._done
        if same_kind:
            return examples * sum(d.seconds for d in same_kind) / sum(d.examples for d in same_kind)
        if self._current is None or not (rate := self.steps_a_second()):
            return None
        return examples / (rate * self._current.global_batch_size)
