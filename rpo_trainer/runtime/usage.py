"""What this process has used of its machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Most bytes held since the process began: on the GPU where there is one, else by the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():  # unlike ru_maxrss not raised by the process that started this one
        (line,) = [x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
