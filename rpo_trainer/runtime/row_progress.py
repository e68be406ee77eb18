"""Progress of work on many rows: a bar in a terminal, a line of the display of a run, else log lines."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rpo_trainer.runtime.terminal import console, handlers_redirected, is_interactive

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)

LINE_SECONDS = 15.0  # between two log lines, and before the first
_BAR_SECONDS = 1.0  # before a bar appears
_REDRAWN = 0.1  # seconds between two drawings

Display = Callable[[str], None]
_display: Display | None = None
_bar_shown = False  # a terminal has room for one bar


def duration(seconds: float) -> str:
    """Format seconds as `03:07`, or as `1:03:07` from one hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


@contextmanager
def shown_in(display: Display) -> Iterator[None]:
    """Inside, show progress by calling `display` with a line of text, or "" at the end of the work."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


class RowProgress:
    """Shows how many rows of some work are done, how many a second, and the time left. A context manager.

    Nothing is shown for work of less than a second. A bar is drawn by `advance`, not by a thread, so that
    processes can be forked meanwhile.

    Args:
        total: number of rows; None: unknown.
        what: names the work, such as "tokenizing train data".
        unit: what is counted, in the plural.
        show: False: show nothing. Processes that a launcher started show nothing unless their `RANK` is 0.
        bar: False: log lines in a terminal too.
        done: rows that an earlier process has finished.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        *,
        unit: str = "rows",
        show: bool = True,
        bar: bool = True,
        done: int = 0,
    ) -> None:
        self.total = total
        self.what = what
        self.unit = unit
        self.done = done
        self._show = show and os.environ.get("RANK", "0") == "0"
        self._bars = bar
        self._earlier = done
        self._began = self._drawn = self._logged = time.monotonic()
        self._bar: Progress | None = None
        self._open = ExitStack()
        self._lines = 0

    def __enter__(self) -> RowProgress:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        if self._show and _display is not None:
            _display("")
        if self._lines and error[0] is None:
            self._log()

    def advance(self, rows: int = 1) -> None:
        """Count rows as done."""
        self.done += rows
        now = time.monotonic()
        if not self._show or now - self._drawn < _REDRAWN:
            return
        self._drawn = now
        if _display is not None:
            if now - self._began >= _BAR_SECONDS:
                _display(f"{self.what}: {self.state()}")
        elif self._bars and is_interactive():
            self._draw(now)
        elif now - self._logged >= LINE_SECONDS:
            self._logged = now
            self._log()

    def state(self) -> str:
        """Return, for example, `12,000 of 800,000 rows, 5,200 rows/s, 02:31 left`."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}"]
        rate = (self.done - self._earlier) / max(time.monotonic() - self._began, 1e-9)
        if rate > 0:
            parts.append(
                f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"
            )
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def _log(self) -> None:
        self._lines += 1
        logger.info("%s: %s", self.what, self.state())

    def _draw(self, now: float) -> None:
        if self._bar is None:
            if _bar_shown or now - self._began < _BAR_SECONDS:
                return
            self._bar = self._open.enter_context(_new_bar())
            self._bar.add_task(self.what, total=self.total, state="")
        self._bar.update(self._bar.task_ids[0], completed=self.done, state=self.state())
        self._bar.refresh()


@contextmanager
def _new_bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn

    global _bar_shown
    what = TextColumn("{task.description}", markup=False)
    state = TextColumn("{task.fields[state]}", markup=False)
    bar = Progress(
        what, BarColumn(20), state, console=console(), auto_refresh=False, transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
    _bar_shown = True
    try:
        with bar, handlers_redirected():
            yield bar
    finally:
        _bar_shown = False
