"""Which process runs in a run directory: a file next to the lock, present while the lock is held."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

HOLDER_FILE = ".lock-holder"


def holder_text() -> str:
    """Return the content of the file for this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_holder(run_dir: Path) -> str:
    """Return the process that holds the run directory, or held it when it died; "" for none."""
    try:
        return (run_dir / HOLDER_FILE).read_text(errors="replace")
    except OSError:
        return ""


def is_running(run_dir: Path) -> bool:
    """Whether a run is in progress in the directory.

    A process on another host, or on a system other than POSIX, counts as alive while the file exists.
    """
    found = re.fullmatch(r"process (\d+) on (.*)", read_holder(run_dir))
    if found is None:
        return False
    if found[2] != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # alive, but owned by another user
        return True
    return True
