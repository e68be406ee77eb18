"""Linux seccomp filter: system calls that tested code cannot make, regardless of its user.

New threads are allowed; new processes, sockets other than pairs, and signals to other processes are not.
The filter requires no privileges and cannot be removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Any

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x10000
_X32 = 0x40000000  # first number of the x32 ABI
# By machine: audit number, clone, clone3, tgkill, and the refused calls.
_MACHINES: dict[str, tuple[int, int, int, int, dict[str, int]]] = {
    "x86_64": (0xC000003E, 56, 435, 234, {
        "socket": 41, "connect": 42, "bind": 49, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
        "ptrace": 101, "setpgid": 109, "setsid": 112, "rt_sigqueueinfo": 129, "mount": 165,
        "tkill": 200, "unshare": 272, "rt_tgsigqueueinfo": 297, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "execveat": 322,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, 220, 435, 131, {
        "mount": 40, "unshare": 97, "ptrace": 117, "kill": 129, "tkill": 130,
        "rt_sigqueueinfo": 138, "setpgid": 154, "setsid": 157, "socket": 198, "bind": 200,
        "connect": 203, "execve": 221, "rt_tgsigqueueinfo": 240, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "execveat": 281,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_getfd": 438,
    }),
}  # fmt: skip


def forbid_calls(libc: Any) -> bool:
    """Install the filter in this process, which must have set `no_new_privs`; False on failure."""
    program = _program()
    if not program:
        return False
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0) == 0)


def _program() -> bytes:
    """Return the filter as BPF instructions; empty for unknown machines."""
    if platform.machine() not in _MACHINES:
        return b""
    audit, clone, clone3, tgkill, refused = _MACHINES[platform.machine()]
    deny = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    argument = (_LOAD, 0, 0, _ARGUMENT)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), deny,
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), deny,
        # A filter cannot read the flags of clone3 in memory: without clone3 the C library uses clone.
        (_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_EQUAL, 0, 4, clone), argument, (_ANY_BIT, 1, 0, _CLONE_THREAD), deny, allow,
        (_EQUAL, 0, 4, tgkill), argument, (_EQUAL, 1, 0, os.getpid()), deny, allow,
    ]  # fmt: skip
    for number in refused.values():
        steps += [(_EQUAL, 0, 1, number), deny]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, allow])
