"""Progress of a chain: in a terminal, a bar for the stage and one for the chain; else plain lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from rpo_trainer.chain.time_left import TimeLeft
from rpo_trainer.runtime import distributed
from rpo_trainer.runtime.row_progress import duration, shown_in
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
# The same metrics of held-out data, in lines with room for whole words
_HELD_OUT = _SHOWN | dict.fromkeys(("rewards/accuracies", "accuracy"), "pair accuracy")
_LABEL = 20  # columns of a stage's name
_REDRAWN = 0.1  # seconds between two drawings


class ChainProgress:
    """The progress display of one run, on the first rank and in a terminal only.

    The training thread draws it. A separate thread could hold the console's lock while a data loader worker
    is forked.

    Args:
        stages: number of stages of the chain.
        time_left: estimates how long they take.
    """

    def __init__(self, stages: int, time_left: TimeLeft) -> None:
        self.stages = stages
        self.time_left = time_left
        self.live: Live | None = None
        self.metrics = ""
        self._number, self._name, self._phase = 0, "", ""
        self._steps: tuple[int, int] | None = None  # done and planned, while a stage trains
        self._trained = 0.0  # fraction of the stage's steps
        self._drawn = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the display inside the context; lines that are logged or printed appear above it."""
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
            with live, handlers_redirected(), shown_in(self.rows):
                yield
        finally:
            self.live = None

    def begin(self, number: int, name: str) -> None:
        """Start a stage.

        Args:
            number: its position in the chain, from 1.
        """
        self._number, self._name, self._trained = number, name, 0.0
        self.time_left.begin(name)
        self.phase("preparing data")

    def phase(self, text: str) -> None:
        """Show what the stage does now, other than training."""
        self._phase, self._steps, self.metrics = text, None, ""
        self.draw()

    def rows(self, text: str) -> None:
        """Show the progress of work on rows below the bars, see `RowProgress`."""
        self.metrics = text
        self.draw()

    def step(self, done: int, planned: int) -> None:
        """Move the stage's bar."""
        self._steps, self._trained = (done, planned), done / max(1, planned)
        if time.monotonic() - self._drawn > _REDRAWN:
            self.draw()

    def draw(self) -> None:
        """Draw the current state."""
        if self.live is not None:
            self._drawn = time.monotonic()
            self.live.refresh()

    def callback(self, label: str) -> StageProgress:
        """Return the callback for the trainer of a stage; `label` begins each plain line."""
        return StageProgress(label, self)

    def render(self) -> RenderableType:
        """Return the bars, and a line of metrics below them."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self._number:
            return Text("\n".join(filter(None, ("checking", self.metrics))), "dim")
        state = self._phase
        if self._steps is not None:
            state = "step {}/{}".format(*self._steps) + _left(self.time_left.of_training())
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=_LABEL)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(self._name, ProgressBar(1, self._trained), state)
        if self.stages > 1:
            chain = f"stage {self._number}/{self.stages}{_left(self.time_left.of_chain())}"
            part = self._number - 1 + self._trained
            grid.add_row("chain", ProgressBar(self.stages, part), chain)
        figures = Text(self.metrics, "dim", no_wrap=True, overflow="ellipsis")
        return Group(grid, figures) if self.metrics else grid


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


class StageProgress(TrainerCallback):
    """Shows a stage's steps, metrics, examples per second and time left: as a bar, or line by line.

    Metrics of held-out data are always lines.
    """

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
        if any(name.startswith("eval_") for name in logs):
            self._log_held_out(state, logs)
            return
        digits = 4 if self.chain.live is None else 3  # in a terminal, all of them fit 80 columns
        shown = [
            f"{short} {logs[name]:.{digits}g}" for name, short in _SHOWN.items() if name in logs
        ]
        if not shown:
            return
        rate = self.chain.time_left.steps_a_second()
        if rate:
            unit = "examples/s" if self.chain.live is None else "ex/s"
            shown.append(f"{rate * args.examples_per_step():.3g} {unit}")
        if self.chain.live is not None:
            self.chain.metrics = "  ".join(shown)
            self.chain.draw()
            return
        if (seconds := self.chain.time_left.of_training()) is not None:
            shown.append(f"{duration(seconds)} left")
        if self.chain.stages > 1 and (seconds := self.chain.time_left.of_chain()) is not None:
            shown.append(f"chain {duration(seconds)} left")
        text = "  ".join(shown)
        logger.info("%s step %d/%d  %s", self.label, state.global_step, state.max_steps, text)

    def _log_held_out(self, state: Any, logs: Mapping[str, Any]) -> None:
        """Log an evaluation on the held-out data, as a line in a terminal too."""
        shown = [
            f"{label} {logs[f'eval_{name}']:.4g}"
            for name, label in _HELD_OUT.items()
            if f"eval_{name}" in logs
        ]
        if shown:
            step, steps, text = state.global_step, state.max_steps, ", ".join(shown)
            logger.info("%s held-out at step %d/%d: %s", self.label, step, steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.chain.phase("saving")
