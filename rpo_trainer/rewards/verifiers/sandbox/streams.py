"""Standard input and output of the candidate, connected to those of the calling test.

`input` and `print` are connected too, if a test replaces them.
"""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 24  # bytes of output kept per call

_PRINT = builtins.print
_Ask = Callable[[str, Any, tuple[Any, ...], Any], Any]


class Output:
    """Buffers the output of the response until the next message to the tester."""

    def __init__(self, ask: _Ask) -> None:
        self._ask = ask
        self._replaced = False
        self._bytes = io.BytesIO()
        self._text = io.TextIOWrapper(
            self._bytes, "utf-8", "surrogatepass", newline="", write_through=True
        )
        sys.stdout = self._text

    def note(self, text: str) -> None:
        """Read the note of a request: whether the test replaced `print`."""
        self._replaced = text == "print"

    def print(self, *values: Any, **options: Any) -> None:
        """Call the builtin `print`, or the replacement of the test."""
        if self._replaced and options.get("file") is None:
            self._ask("print", None, values, options)
        else:
            _PRINT(*values, **options)

    def take(self) -> str:
        """Return the output since the last call."""
        try:
            if not self._bytes.tell():
                return ""
            data = self._bytes.getvalue()[:LARGEST]
            self._bytes.seek(0)
            self._bytes.truncate()
            return data.decode("utf-8", "replace")
        except ValueError:  # the response closed it
            return ""


class Input(io.TextIOBase):
    """Reads the standard input of the test; empty while no test calls."""

    def __init__(self, ask: _Ask, called: Callable[[], bool]) -> None:
        super().__init__()
        self._ask, self._called = ask, called

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int | None = -1) -> str:
        """Read up to `size` characters."""
        return str(self._ask("stdin", None, ("read", size), {})) if self._called() else ""

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        """Read the next line, with its line break."""
        return str(self._ask("stdin", None, ("readline", size), {})) if self._called() else ""

    def input(self, prompt: object = "") -> Any:
        """Call the builtin `input`, or the replacement of the test."""
        if not self._called():
            raise EOFError("there is no input while the code is loaded")
        return self._ask("stdin", None, ("input", str(prompt)), {})


def connect(ask: _Ask, called: Callable[[], bool]) -> Output:
    """Replace the streams of this process; `called` returns whether a test is waiting."""
    source = Input(ask, called)
    sys.stdin = source
    builtins.input = source.input
    output = Output(ask)
    builtins.print = output.print
    return output


def note() -> str:
    """In the tester: return the note for `Output.note`."""
    return "" if builtins.print is _PRINT else "print"


def read(how: Any, argument: Any) -> str:
    """Serve a request of `Input` in the tester."""
    if how == "input":
        line = builtins.input(argument)
        return line if type(line) is str else str(line)
    if how not in ("read", "readline") or type(argument) not in (int, type(None)):
        raise TypeError("not a request for input")
    return str(getattr(sys.stdin, how)(-1 if argument is None else argument))


def show(*values: Any, **options: Any) -> None:
    """Serve a request of `Output.print` in the tester."""
    if builtins.print is not _PRINT:
        builtins.print(*values, **options)
