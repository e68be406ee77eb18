"""Freed memory kept for the next step, on a CPU under glibc."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MIB = 2**20
# Where glibc's own adjustment ends in a process that frees large blocks, and its default.
_AS_USUAL = {_MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _MMAP_MAX: 65536}


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Inside, large blocks that are freed stay with the process; at the end they are given back.

    As it comes, glibc asks the system for every large block anew and hands it back when freed, and the
    system clears each page once more: the tensors of a training step are of this size, and come again in
    every step. Nothing is done without glibc, or where the user has set an option of malloc
    (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    libc = _glibc()
    if libc is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)  # an int; what lies beyond is given back
    try:
        yield
    finally:
        for option, value in _AS_USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
