"""Wrap the text of an error at words, to the width of the terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap


def wrap(text: str) -> str:
    """Return the text with long lines wrapped and indented, if stderr is a terminal.

    Otherwise the text is unchanged, so that programs read one line for each part of an error.
    """
    if not sys.stderr.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    return "\n".join(_wrapped(line, width) for line in text.splitlines())


def _wrapped(line: str, width: int) -> str:
    indent = len(line) - len(line.lstrip())
    # Below the text of `why:` and `fix:`, else by four more than the line.
    hanging = indent + (5 if line.lstrip().startswith(("why: ", "fix: ")) else 4)
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
