"""Memory of this process: its peak, and freed blocks reused by the next step (CPU, glibc)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MIB = 2**20
# Where glibc's own adjustment ends in a process that frees large blocks, and its default.
_AS_USUAL = {_MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _MMAP_MAX: 65536}


def peak_memory() -> int:
    """Return the peak bytes since the process started: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():  # unlike ru_maxrss not raised by the process that started this one
        (line,) = [x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil  # type: ignore[import-untyped]  # of accelerate

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep large freed blocks in the process inside, and return them to the system at the end.

    By default glibc requests every large block from the system and returns it when freed, and the system
    clears each page again. Tensors of a training step have this size and recur in every step. Without glibc,
    or if the user has set a malloc option (`MALLOC_*`, `GLIBC_TUNABLES`), nothing is done.
    """
    libc = _glibc()
    if libc is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)  # the largest int
    try:
        yield
    finally:
        for option, value in _AS_USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Return the memory of small freed objects to the system (glibc), whatever was allocated between them."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
