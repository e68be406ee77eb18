"""CPU cores: how many this process may use, how its threads wait, and how many are busy.

torch is not imported here, because the wait policy of threads is fixed once it is loaded.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_STAT = Path("/proc/stat")
_SPINS = "1000"
_SHORTEST = 0.5  # seconds: /proc/stat counts in hundredths


def shorten_waits() -> None:
    """Shorten the spinning of OpenMP threads, unless the user has set a wait policy.

    By default threads of GNU OpenMP spin for long at the end of each operation. If another process shares a
    core, the spinning threads keep it from the thread that they wait for. The count here is the library's own
    for more threads than cores. Results do not change.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def usable_cores(*, divided: bool = True) -> int:
    """Return the cores for this process: its affinity, limited by cgroup quotas, divided by local ranks.

    Args:
        divided: False: the other local ranks wait, so that their cores are free.
    """
    cores = float(_affinity())
    if quotas := _quotas():
        cores = min(cores, *quotas)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if divided else 1
    return max(1, math.ceil(cores) // ranks)


def limit_threads() -> None:
    """Lower torch's thread count to the cores of this process.

    torch counts the cores that it may run on, without container quotas and other ranks. The current load is
    ignored, because a resumed run must use as many threads as one that was never stopped. A count set by the
    user, in the environment or in torch, is kept.
    """
    import torch

    cores, of_torch, affinity = usable_cores(), torch.get_num_threads(), _affinity()
    # One per core, or one per two hardware threads.
    automatic = of_torch in (affinity, affinity // 2)
    if of_torch > cores and automatic and not any(name in os.environ for name in _COUNTS):
        torch.set_num_threads(cores)
        logger.info(
            "CPU threads: %d instead of %d, the cores available to this process", cores, of_torch
        )


class OtherProcesses:
    """Measures how many cores other processes use since its creation."""

    def __init__(self) -> None:
        self._start = _busy_seconds()

    def cores(self) -> float | None:
        """Return the mean number, of the cores this process may use; None if it cannot be measured."""
        end = _busy_seconds()
        if self._start is None or end is None or (passed := end[0] - self._start[0]) < _SHORTEST:
            return None
        return max(0.0, (end[1] - self._start[1]) / passed)

    def report(self) -> None:
        """Log the thread count once per process; a WARNING if other processes need the same cores.

        A single thread never waits for others, so it gets no warning.
        """
        import torch

        threads, affinity, others = torch.get_num_threads(), _affinity(), self.cores()
        if threads > 1 and others is not None and threads + others > affinity + 0.5:
            _log_once(
                logging.WARNING,
                f"{threads} CPU threads, but other processes keep {others:.1f} of {affinity} cores busy: "
                f"training is slower. Stop them, or set OMP_NUM_THREADS={max(1, int(affinity - others))}"
                f"{_advice()}",
            )
        else:
            _log_once(logging.INFO, f"CPU threads: {threads} on {affinity} cores")


_logged_levels: set[int] = set()  # levels


def _log_once(level: int, line: str) -> None:
    if all(level > logged for logged in _logged_levels):
        _logged_levels.add(level)
        logger.log(level, "%s", line)


def _advice() -> str:
    if any(name in os.environ for name in _WAITING):
        return ""
    return f" and GOMP_SPINCOUNT={_SPINS} before Python starts"


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas() -> list[float]:
    """Return the CPU quotas of the process's cgroups (version 2 or 1), in cores."""
    found = []
    for line in _lines(_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        # A container may see its own cgroup as the root, under the path of the host.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            if controllers:
                files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                words = [word for name in files for word in _lines(folder / name)]
            else:
                words = " ".join(_lines(folder / "cpu.max")).split()
            if len(words) == 2 and words[0] not in ("max", "-1"):
                found.append(int(words[0]) / int(words[1]))
    return found


def _busy_seconds() -> tuple[float, float] | None:
    """Return the time, and the CPU seconds that other processes have used on this process's cores."""
    if sys.platform != "linux":
        return None
    usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in _lines(_STAT):
        name, *counts = line.split()
        if name in usable:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + softirq + steal
    if not ticks:
        return None
    own = os.times()
    return (
        time.monotonic(),
        ticks / os.sysconf("SC_CLK_TCK")
        - (own.user + own.system + own.children_user + own.children_system),
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
