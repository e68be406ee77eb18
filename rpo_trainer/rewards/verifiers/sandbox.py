"""Run as a script, alone in its process: limits first, then a response's code and its tests.

Nothing of the package is imported here: whatever is, the code could reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

MEMORY = 1 << 30
FILE = 1 << 20
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
# Audit events of what code under test has no business with: the network, other processes.
_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.kill", "os.startfile", "pty.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "http.",
)  # fmt: skip
# Events that change files, with the positions of the paths in their arguments.
_WRITES = {
    "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.mkdir": (0,), "os.chmod": (0,),
    "os.chown": (0,), "os.link": (1,), "os.symlink": (1,), "os.truncate": (0,), "os.utime": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1),
}  # fmt: skip


def limit(seconds: int) -> None:
    """Time, memory, size of files, no core dump, no new processes, no network."""
    # Whoever ignores the parent's kill still ends: an alarm that code may turn off, and CPU time.
    signal.alarm(seconds + 1)
    for what, value in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))
    _leave_network()
    # Behind a new user namespace, where even root counts as somebody.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _leave_network() -> None:
    """A network namespace of one's own, where the system lets a user make one; else the hook alone."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def guard(home: str) -> None:
    """Refuses what `_FORBIDDEN` names, and changes to files outside of `home`."""
    inside = os.path.realpath(home) + os.sep

    def outside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        return not os.path.realpath(os.fsdecode(path)).startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if (writes or set(mode or "") & set("wax+")) and outside(path):
                raise PermissionError("files are written in the working directory alone")
        elif event in _WRITES and any(outside(arguments[i]) for i in _WRITES[event]):
            raise PermissionError("files are changed in the working directory alone")

    sys.addaudithook(hook)  # there is no way to take it off again


def main() -> None:
    """Reads the task, and writes one line for every test that passes."""
    task = json.loads(sys.stdin.read())
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    limit(task["seconds"])
    guard(os.getcwd())
    # A test must not count as passed because the code of another has left the process.
    namespace: dict[str, Any] = {"__name__": "__response__"}
    try:
        exec(compile(task["code"], "response", "exec"), namespace)
    except BaseException:
        os._exit(1)
    for number, test in enumerate(task["tests"]):
        try:
            exec(compile(test, "test", "exec"), namespace)
        except BaseException:  # SystemExit too
            continue
        os.write(report, f"{task['token']} {number}\n".encode())
    os._exit(0)  # no exit handlers of the code's own


if __name__ == "__main__":
    main()
