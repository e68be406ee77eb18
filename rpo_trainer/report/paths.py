"""Paths in a report that is sent: relative, or the last part only."""

from __future__ import annotations

import re
from pathlib import Path

# An absolute POSIX or Windows path; not the path of a URL, nor the rest of a relative path.
_PART = r"[^\s/\\'\"`,;:()\[\]{}<>|]+"
_ABSOLUTE = re.compile(
    rf"(?<![\w.~/\\:…*)\]}}-])(?:/(?:{_PART}/)+|[A-Za-z]:[\\/](?:{_PART}[\\/])*|~/(?:{_PART}/)*)"
    rf"(?P<last>{_PART})?"
)
_HOME = re.compile(
    r"(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/]+"
)  # its last part is a user name
_FILE_URL = re.compile(r"\bfile://(?=/)")


def without_absolute_paths(text: str, run_dir: Path) -> str:
    """Make the paths in `text` relative to the run directory; of others, keep the last part only.

    Neither the directories of the machine nor the user name remain.
    """
    resolved = run_dir.resolve()
    text = _FILE_URL.sub("", text)
    for folder, shown in ((str(resolved), "."), (str(resolved.parent), "..")):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?=[/\\\s'\"`,;:)\]}}]|$)", shown, text)
    return _ABSOLUTE.sub(_shortened, text)


def _shortened(found: re.Match[str]) -> str:
    if _HOME.fullmatch(found[0]):
        return "~"
    return f"…/{found['last'] or ''}"
