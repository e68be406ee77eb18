"""What a person sees while a chain runs: a bar for the chain and one for the stage, else plain lines."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from rpo_trainer.runtime import distributed

logger = logging.getLogger(__name__)

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/target_gap": "target",
    "rewards/accuracies": "acc",
    "accuracy": "acc",
    "logps/chosen_delta": "Δchosen",
}
_CHAIN = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
_STAGE = "{desc} {percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def _has_width(stream: TextIO) -> bool:
    """False for a terminal without columns, as some job runners have: a bar would not be drawn."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # not a terminal of the system
        return True


class ChainProgress:
    """The bars of one run, in a terminal and on the first rank alone.

    Args:
        stages: how many the chain has.
    """

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.bar: Any = None
        self.stage_bar: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The chain's bar while it is entered; messages scroll above it."""
        if not (distributed.is_main() and sys.stderr.isatty() and _has_width(sys.stderr)):
            yield
            return
        self.bar = tqdm(total=self.stages, bar_format=_CHAIN, position=0, dynamic_ncols=True)
        try:
            with logging_redirect_tqdm([logging.getLogger("rpo_trainer")]):
                yield
        finally:
            self.end_stage()
            self.bar.close()
            self.bar = None

    def end_stage(self) -> None:
        """Takes the stage's bar away."""
        if self.stage_bar is not None:
            self.stage_bar.close()
            self.stage_bar = None

    def at(self, stage: int, part: float) -> None:
        """Moves the chain's bar.

        Args:
            stage: its number, from 1.
            part: how much of it is done, in [0, 1].
        """
        if self.bar is not None:
            self.bar.n = stage - 1 + part
            self.bar.set_description_str(f"chain, stage {stage} of {self.stages}")

    def callback(self, label: str, stage: int) -> StageProgress:
        """The progress of a stage, for its trainer."""
        return StageProgress(label, self, stage)


class StageProgress(TrainerCallback):
    """Loss, margin, examples a second and time left: in a bar under the chain's, else line by line."""

    def __init__(self, label: str, chain: ChainProgress, stage: int) -> None:
        self.label = label
        self.chain = chain
        self.stage = stage
        self._begun: tuple[float, int] | None = None  # (time, step) when the first step began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.chain.bar is not None:
            self._move_chain(state)
            self.chain.stage_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.label,
                bar_format=_STAGE,
                position=1,
                leave=False,
                dynamic_ncols=True,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begun is None:
            self._begun = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bar = self.chain.stage_bar
        if bar is not None:
            bar.update(state.global_step - bar.n)
            self._move_chain(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        shown = [f"{short} {logs[name]:.4g}" for name, short in _SHOWN.items() if name in logs]
        if not shown:
            return
        rate = self._steps_a_second(state)
        if rate:
            shown.append(f"{rate * args.examples_per_step():.3g} examples/s")
        if self.chain.stage_bar is not None:
            self.chain.stage_bar.set_postfix_str("  ".join(shown))
            return
        if rate:
            shown.append(
                f"{tqdm.format_interval((state.max_steps - state.global_step) / rate)} left"
            )
        text = "  ".join(shown)
        logger.info("%s step %d/%d  %s", self.label, state.global_step, state.max_steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.end_stage()

    def _steps_a_second(self, state: Any) -> float:
        """Since this process began the stage; 0 before there is anything to measure."""
        if self._begun is None:
            return 0.0
        seconds, steps = time.monotonic() - self._begun[0], state.global_step - self._begun[1]
        return steps / seconds if seconds > 0 else 0.0

    def _move_chain(self, state: Any) -> None:
        self.chain.at(self.stage, state.global_step / max(1, state.max_steps))
