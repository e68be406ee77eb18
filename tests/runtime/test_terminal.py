"""Lines in a terminal: wrapped at words; of other libraries' lines only harmless ones are hidden."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr

import pytest

from rpo_trainer.runtime import harmless_lines, terminal
from rpo_trainer.runtime.terminal import TerminalHandler, fitted, wrapped

LONG = "a line that is much longer than the terminal is wide, with /a/path/that/is/long.txt in it"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 80])
def test_lines_are_broken_at_spaces_and_nothing_is_lost(width: int) -> None:
    lines = wrapped(f"short\n    {LONG}", width).split("\n")
    assert lines[0] == "short"
    assert " ".join(lines[1:]).split() == LONG.split()
    assert all(len(line) <= width or "/a/path" in line for line in lines)
    assert all(line.startswith("      ") for line in lines[2:])


def test_a_stream_that_is_not_a_terminal_gets_the_text_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    assert fitted(LONG, io.StringIO()) == LONG
    assert "\n" in fitted(LONG, Terminal())


@pytest.mark.parametrize("in_terminal", [True, False])
def test_the_handler_wraps_in_a_terminal_only(
    in_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.console.cache_clear()
    stream = Terminal() if in_terminal else io.StringIO()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s [not markup]", (LONG,), None)
    with redirect_stderr(stream):
        TerminalHandler().handle(record)
    terminal.console.cache_clear()
    text = stream.getvalue()
    assert text.split() == f"{LONG} [not markup]".split()
    assert (len(text.splitlines()) > 1) is in_terminal and text.endswith("\n")


def test_harmless_lines_are_hidden_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    harmless_lines.hide_harmless_lines()
    harmless_lines.hide_harmless_lines()
    for name, beginnings in harmless_lines.HARMLESS.items():
        logger = logging.getLogger(name)
        for beginning in beginnings:
            logger.warning("%s and so on", beginning)
        logger.warning("another line of %s", name)
        assert len(logger.filters) == 1
    # A record may reach two handlers of pytest.
    assert set(caplog.messages) == {f"another line of {name}" for name in harmless_lines.HARMLESS}


def test_harmless_warnings_are_hidden_in_their_module_alone() -> None:
    (module, (beginning, category)), *_ = harmless_lines.HARMLESS_WARNINGS.items()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        harmless_lines.hide_harmless_lines()
        for place in (module, "elsewhere"):
            warnings.warn_explicit(f"{beginning} and so on", category, "x.py", 1, module=place)
        warnings.warn_explicit("another", category, "x.py", 1, module=module)
    assert [str(one.message).split()[-1] for one in found] == ["on", "another"]


@pytest.mark.parametrize(
    ("keys", "shown"), [("['lm_head.weight']", False), ("['lm_head.weight', 'b']", True)]
)
def test_missing_keys_are_hidden_only_where_they_are_tied(
    keys: str, shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers.trainer")
    with harmless_lines.tied_keys_hidden(["lm_head.weight"]):
        logger.warning("There were missing keys in the checkpoint model loaded: %s.", keys)
    logger.warning("There were missing keys in the checkpoint model loaded: ['c'].")
    # A record may reach two handlers of pytest.
    assert len(set(caplog.messages)) == 1 + shown
