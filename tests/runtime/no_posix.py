"""Run a program as on Windows, as far as this system can: without POSIX modules and functions.

    python -m tests.runtime.no_posix imports | check RECIPE | asserts | peak

The modules are missing for this package only, and the functions once its libraries are loaded, which have
separate builds for each system.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import signal
import sys
from typing import Any

MODULES = {
    "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix",
    "_posixsubprocess",
}  # fmt: skip
OF_OS = (
    "fork", "forkpty", "killpg", "setsid", "getuid", "geteuid", "getgid", "sched_getaffinity",
    "sysconf", "mkfifo", "fchmod", "getpgid", "O_DIRECTORY", "O_NOFOLLOW", "chown",
    "getloadavg",
)  # fmt: skip
OF_SIGNAL = (
    "SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE", "setitimer",
    "alarm", "ITIMER_REAL",
)  # fmt: skip
LIBRARIES = (
    "subprocess", "multiprocessing.pool", "multiprocessing.shared_memory", "torch.distributed",
    "transformers", "accelerate", "datasets", "peft",
)  # fmt: skip
# A dependency of torch's builds for GPUs; the head's kernels are only used with it.
OPTIONAL = ("triton",)
_ELSEWHERE = ("rpo_trainer.rewards.verifiers.sandbox", "rpo_trainer.__main__")  # programs


def forget_posix() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    real = builtins.__import__

    def guarded(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        ours = str((globals or {}).get("__name__", "")).startswith("rpo_trainer")
        if ours and level == 0 and name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = guarded
    for owner, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)


def import_all() -> None:
    import rpo_trainer

    for found in pkgutil.walk_packages(rpo_trainer.__path__, "rpo_trainer."):
        if found.name.startswith(_ELSEWHERE):
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            print("not installed", error.name, file=sys.stderr)
        print("imported", found.name)


def main(command: str, *words: str) -> None:
    forget_posix()
    if command == "imports":
        import_all()
    elif command == "check":
        from rpo_trainer.cli.commands import cli

        cli(["check", *words])
    elif command == "asserts":
        from rpo_trainer.errors import RunError
        from rpo_trainer.rewards.verifiers.asserts import require_sandbox

        try:
            require_sandbox()
        except RunError as error:
            print("refused", error.code, error.what)
    else:
        from rpo_trainer.runtime.cores import usable_cores

        print("cores", usable_cores())


if __name__ == "__main__":
    main(*sys.argv[1:])
