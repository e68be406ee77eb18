"""On PYTHONPATH of the processes of benchmarks/data.py: counts what they read of the source files.

Each open of a source adds a file `read-*.json` to the log directory, with the process and its callers, and an
8-byte counter of the bytes read, which stays correct if the process is killed. Reads of Python's file objects
are counted, not those of C++ libraries that open a file themselves, nor of mapped files.
"""

import builtins
import io
import itertools
import json
import mmap
import os
import struct
import sys

_NUMBERS = itertools.count()
_open = io.open


class _Counted(io.FileIO):
    """A file that adds what is read to a counter on disk."""

    def __init__(self, path, log):
        super().__init__(path, "r")
        stem = os.path.join(log, f"read-{os.getpid()}-{next(_NUMBERS)}")
        with _open(stem + ".count", "w+b") as file:
            file.write(bytes(8))
            file.flush()
            self._count = mmap.mmap(file.fileno(), 8)
        with _open(stem + ".json", "w") as file:
            json.dump({"pid": os.getpid(), "path": path, "callers": _callers()}, file)

    def _add(self, size):
        struct.pack_into("<q", self._count, 0, struct.unpack_from("<q", self._count)[0] + size)

    def readinto(self, buffer):
        size = super().readinto(buffer)
        self._add(size or 0)
        return size

    def read(self, size=-1):
        data = super().read(size)
        if size is not None and size >= 0:  # otherwise `readall` has counted
            self._add(len(data or b""))
        return data

    def readall(self):
        data = super().readall()
        self._add(len(data or b""))
        return data


def _callers():
    """Return the calling functions outside the standard library, innermost first."""
    found = []
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in sys.stdlib_module_names and name != __name__:
            found.append(f"{name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return found


def _install(sources, log):
    def opened(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None,
    ):  # fmt: skip
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
        if not isinstance(name, str) or opener is not None or not {*mode} <= {*"rbtU"}:
            name = None
        if name is None or os.path.realpath(name) not in sources:
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _Counted(name, log)
        if buffering == 0:
            return raw
        buffer = io.BufferedReader(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    io.open = builtins.open = opened


if "BENCH_DATA_SOURCES" in os.environ:
    _install(set(json.loads(os.environ["BENCH_DATA_SOURCES"])), os.environ["BENCH_DATA_LOG"])
