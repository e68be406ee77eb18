"""The terminal: one console that log lines and progress bars share."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_INDENT = "  "  # of the lines that continue a wrapped one


def is_interactive(stream: TextIO | None = None) -> bool:
    """Whether a stream, by default stderr, is a terminal on which lines can be redrawn.

    False for pipes and files, for `TERM=dumb`, and for a terminal of zero columns, as some job runners
    have.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty() or os.environ.get("TERM", "").lower() == "dumb":
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # not a terminal of the system
        return True


@functools.cache
def console() -> Console:
    """Return the console on stderr; what is printed through it appears above the progress bars."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def wrapped(text: str, width: int) -> str:
    """Wrap the lines of a text at spaces. A word longer than the width is not broken.

    The terminal breaks such a word itself, so that a path can still be copied.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())] + _INDENT
        lines += textwrap.wrap(
            line, max(width, 2 * len(indent)), subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False, replace_whitespace=False,
        )  # fmt: skip
    return "\n".join(lines)


def fitted(text: str, stream: TextIO) -> str:
    """Wrap a text at words if the stream is a terminal."""
    if not is_interactive(stream):
        return text
    return wrapped(text, shutil.get_terminal_size().columns)


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr: in a terminal, wrapped at words and above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_interactive():
            super().emit(record)
            return
        from rich.text import Text

        try:
            screen = console()
            style = "yellow" if record.levelno >= logging.WARNING else ""
            text = wrapped(self.format(record), screen.width)
            screen.print(Text(text, style), soft_wrap=True)
        except Exception:
            self.handleError(record)


@contextmanager
def handlers_redirected() -> Iterator[None]:
    """Redirect log handlers of libraries to the current `sys.stderr` and `sys.stdout`.

    A live display replaces these two, but a handler keeps the stream it was created with, and would write
    into the display.
    """
    streams: dict[int, str] = {
        id(stream): name
        for name, stream in (
            ("stdout", sys.__stdout__), ("stdout", _original(sys.stdout)),
            ("stderr", sys.__stderr__), ("stderr", _original(sys.stderr)),
        )
        if stream is not None
    }  # fmt: skip
    before: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in _stream_handlers():
        if (name := streams.get(id(handler.stream))) is not None:
            before.append((handler, handler.stream))
            handler.setStream(getattr(sys, name))
    try:
        yield
    finally:
        for handler, stream in before:
            handler.setStream(stream)


def _original(stream: Any) -> Any:
    """Return the stream that a live display has replaced."""
    return getattr(stream, "rich_proxied_file", stream)


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    known = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in known:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and not isinstance(
                handler, (logging.FileHandler, TerminalHandler)
            ):
                yield handler
