"""The progress of a chain: in a terminal a bar for the stage and one for the chain, else plain lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from rpo_trainer.chain.time_left import TimeLeft
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.terminal import console, handlers_redirected, is_interactive

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

logger = logging.getLogger(__name__)

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "gap",
    "rewards/target_gap": "target",
    "rewards/accuracies": "acc",
    "accuracy": "acc",
    "logps/chosen_delta": "Δchosen",
}
_LABEL = 20  # columns of a stage's name
_REDRAWN = 0.1  # seconds between two drawings


def duration(seconds: float) -> str:
    """Minutes and seconds, `03:07`; from an hour on `1:03:07`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


class ChainProgress:
    """The display of one run: drawn on the first rank, and in a terminal.

    It is drawn when something happens, by the thread that trains: a thread of its own could hold the
    console's lock while a data loader's process is forked.

    Args:
        stages: how many the chain has.
        time_left: what estimates how long they take.
    """

    def __init__(self, stages: int, time_left: TimeLeft) -> None:
        self.stages = stages
        self.time_left = time_left
        self.live: Live | None = None
        self.metrics = ""
        self._number, self._name, self._phase = 0, "", ""
        self._steps: tuple[int, int] | None = None  # done and planned, while a stage trains
        self._drawn = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Displays it while it is entered; what is logged or printed meanwhile appears above it."""
        if not (distributed.is_main() and is_interactive(sys.stderr)):
            yield
            return
        from rich.live import Live

        live = Live(
            console=console(), auto_refresh=False, transient=True,
            redirect_stdout=sys.stdout.isatty(), get_renderable=self.render,
        )  # fmt: skip
        self.live = live
        try:
            with live, handlers_redirected():
                yield
        finally:
            self.live = None

    def begin(self, number: int, name: str) -> None:
        """A stage begins.

        Args:
            number: its place in the chain, from 1.
        """
        self._number, self._name, self._steps, self.metrics = number, name, None, ""
        self.time_left.begin(name)
        self.phase("preparing data")

    def phase(self, text: str) -> None:
        """What the stage does now, other than training."""
        self._phase, self._steps, self.metrics = text, None, ""
        self.draw()

    def step(self, done: int, planned: int) -> None:
        """Moves the stage's bar."""
        self._steps = done, planned
        if time.monotonic() - self._drawn > _REDRAWN:
            self.draw()

    def draw(self) -> None:
        """Draws it as it is now."""
        if self.live is not None:
            self._drawn = time.monotonic()
            self.live.refresh()

    def callback(self, label: str) -> StageProgress:
        """The progress of a stage, for its trainer; `label` begins each plain line."""
        return StageProgress(label, self)

    def render(self) -> RenderableType:
        """The two bars, and a line of figures below them."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self._number:
            return Text("checking", "dim")
        done, planned = self._steps or (0, 1)
        left = _left(self.time_left.of_training()) if self._steps else ""
        state = f"step {done}/{planned}{left}" if self._steps else self._phase
        part = self._number - 1 + done / max(1, planned)
        chain = f"stage {self._number}/{self.stages}{_left(self.time_left.of_chain())}"
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=_LABEL)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(self._name, ProgressBar(planned, done), state)
        grid.add_row("chain", ProgressBar(self.stages, part), chain)
        figures = Text(self.metrics, "dim", no_wrap=True, overflow="ellipsis")
        return Group(grid, figures) if self.metrics else grid


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


class StageProgress(TrainerCallback):
    """Shows a stage's steps, metrics, examples per second and time left: as a bar, or line by line."""

    def __init__(self, label: str, chain: ChainProgress) -> None:
        self.label = label
        self.chain = chain

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.step(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.time_left.step_begins(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.time_left.step_ended(state.global_step, state.max_steps)
        self.chain.step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        shown = [f"{short} {logs[name]:.4g}" for name, short in _SHOWN.items() if name in logs]
        if not shown:
            return
        rate = self.chain.time_left.steps_a_second()
        if rate:
            shown.append(f"{rate * args.examples_per_step():.3g} examples/s")
        if self.chain.live is not None:
            self.chain.metrics = "  ".join(shown)
            self.chain.draw()
            return
        times = (self.chain.time_left.of_training(), self.chain.time_left.of_chain())
        shown += [
            f"{duration(seconds)} left{of}"
            for seconds, of in zip(times, ("", " of the chain"), strict=True)
            if seconds is not None
        ]
        text = "  ".join(shown)
        logger.info("%s step %d/%d  %s", self.label, state.global_step, state.max_steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.phase("saving")
