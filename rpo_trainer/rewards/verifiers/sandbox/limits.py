"""Limits of a process that runs untrusted code: resources, files, network, other processes.

On Linux the kernel enforces them if available: Landlock (files, TCP, signals), seccomp (processes, sockets,
signals), user and network namespaces, `no_new_privs`. An audit hook covers systems without these, and
operations that they do not cover, but code that attacks the interpreter itself can bypass it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import struct
import sys
from typing import Any

from .seccomp import forbid_calls

MEMORY = 1 << 30
FILE = 1 << 20
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
# System calls of Landlock; the numbers are the same on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# Audit events that tested code does not need.
_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.kill", "os.startfile", "os.setxattr", "os.removexattr", "os.lockf", "pty.", "webbrowser.",
    "urllib.", "ftplib.", "smtplib.", "http.", "ctypes.", "sqlite3.", "signal.pthread_kill",
    "syslog.", "resource.", "mmap.", "fcntl.",
)  # fmt: skip
# Events that change files: positions of paths and of directory descriptors in their arguments.
_WRITES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "os.remove": ((0,), (1,)), "os.rename": ((0, 1), (2, 3)), "os.rmdir": ((0,), (1,)),
    "os.mkdir": ((0,), (2,)), "os.chmod": ((0,), (2,)), "os.chown": ((0,), (3,)),
    "os.chflags": ((0,), ()), "os.link": ((0, 1), (2, 3)), "os.symlink": ((1,), (2,)),
    "os.truncate": ((0,), ()), "os.utime": ((0,), (3,)), "shutil.rmtree": ((0,), ()),
    "shutil.move": ((0, 1), ()), "tempfile.mkstemp": ((0,), ()), "tempfile.mkdtemp": ((0,), ()),
}  # fmt: skip
# Functions without an audit event.
_UNSEEN = {
    "os": ("mknod", "mkfifo", "pidfd_open", "setsid", "setpgid", "setpgrp", "setns", "unshare",
           "chroot", "tcsetpgrp", "setpriority", "eventfd", "memfd_create", "nice",
           "sched_setaffinity", "sched_setscheduler", "copy_file_range", "posix_openpt"),
    "signal": ("pidfd_send_signal",),
}  # fmt: skip


def confine(home: str, seconds: int, *, candidate: bool) -> None:
    """Apply all limits to this process; only `home` is writable.

    The candidate also cannot send signals to other processes, and is killed when the tester ends.
    """
    signal.setitimer(
        signal.ITIMER_REAL, seconds
    )  # code can disable it; the parent also kills the process
    for what, value in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            _confine_linux(home, candidate)
    gc.collect()  # frees C library functions that code could otherwise find and call
    for module, names in _UNSEEN.items():
        for loaded in (sys.modules.get(module), sys.modules.get(_C_NAMES[module])):
            for name in names:
                if loaded is not None:
                    loaded.__dict__.pop(name, None)
    with contextlib.suppress(ImportError):
        import _posixsubprocess

        vars(_posixsubprocess)["fork_exec"] = _refuse_process  # it has no audit event either
    _guard(home)


def _refuse_process(*_: Any) -> None:
    raise PermissionError("other processes are not allowed here")


_C_NAMES = {"os": "posix", "signal": "_signal"}


def _confine_linux(home: str, candidate: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)  # not allowed on every system
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # other processes cannot read this process's memory
    if candidate:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _landlock(libc, home, candidate)
    forbid_calls(libc)


def landlock_version() -> int:
    """Return the Landlock version of the kernel; 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1)))


def _landlock(libc: Any, home: str, candidate: bool) -> None:
    version = landlock_version()
    if not version:
        return
    files = (1 << 13) - 1  # the first version: up to MAKE_SYM
    for least, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):  # REFER, TRUNCATE, IOCTL_DEV
        if version >= least:
            files |= right
    tcp = 3 if version >= 4 else 0  # bind, connect
    scoped = (3 if candidate else 1) if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", files, tcp, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return
    # No execution anywhere; reading is allowed everywhere.
    for path, rights in ((home, files & ~_EXECUTE), ("/", _READ_FILE | _READ_DIR)):
        place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _guard(home: str) -> None:
    """Refuse `_FORBIDDEN`, changes to files outside `home`, and reading other processes."""
    root = os.path.realpath(home)
    inside = root + os.sep
    real, decode, exists = os.path.realpath, os.fsdecode, os.path.isdir
    own = os.path.realpath("/proc/self") + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    letters = set("wax+")
    unix = 1 if sys.platform != "win32" else None  # AF_UNIX

    def outside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        text = decode(path)
        # With a directory descriptor, ".." cannot be resolved here.
        if not text.startswith("/") and ".." in text.split("/"):
            return True
        return not (real(text) + os.sep).startswith(inside)

    def other_process(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        place = real(decode(path)) + os.sep
        return place.startswith("/proc/") and place[6:7].isdigit() and not place.startswith(own)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # A connected socket pair, which event loops need, has no access to the network.
        if event == "socket.__new__" and arguments[1] == unix:
            return
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = flags & writing or set(mode or "") & letters
            # With a descriptor of an outside directory, later calls could change files in it.
            if (writes or (mode is None and exists(path))) and outside(path):
                raise PermissionError("only the working directory can be written")
            if other_process(path):
                raise PermissionError("other processes cannot be read")
        elif event in _WRITES:
            paths, directories = _WRITES[event]
            if any(outside(arguments[i]) for i in paths) or any(
                arguments[i] not in (-1, None) and outside_of(arguments[i]) for i in directories
            ):
                raise PermissionError("only the working directory can be changed")

    def outside_of(descriptor: int) -> bool:
        return outside(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else True

    sys.addaudithook(hook)  # it cannot be removed
