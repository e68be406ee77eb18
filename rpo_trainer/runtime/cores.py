"""CPU cores: how many this process may use, how its threads wait, and how many others keep busy.

No torch at import: how threads wait is fixed once torch is loaded.
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
    """Lets threads spin only briefly while they wait for each other, if the user has not said how they wait.

    By default GNU OpenMP's threads spin for long at the end of each operation. Where another process takes
    turns on one of the cores, that keeps the core from the thread that is waited for. They spin as often
    here as that library lets them where it knows of more threads than cores. Results do not change.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def usable_cores() -> int:
    """Cores for this process: its affinity, at most its control groups' quota, shared by local ranks."""
    cores = float(_affinity())
    if quotas := _quotas():
        cores = min(cores, *quotas)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, math.ceil(cores) // ranks)


def limit_threads() -> None:
    """Lowers torch's thread count to the cores of this process.

    torch counts the cores that it may run on, not the share of them that a container is granted, nor the
    other ranks. What others use at the moment plays no part: a resumed run must compute with as many
    threads as one that was never stopped. A count that the user has set, by a variable or in torch, stays.
    """
    import torch

    cores, of_torch, affinity = usable_cores(), torch.get_num_threads(), _affinity()
    # One for each core, or for two hardware threads.
    automatic = of_torch in (affinity, affinity // 2)
    if of_torch > cores and automatic and not any(name in os.environ for name in _COUNTS):
        torch.set_num_threads(cores)
        logger.info("CPU threads: %d instead of %d, for the cores granted here", cores, of_torch)


class OtherProcesses:
    """How many cores other processes use, from the time when it is made."""

    def __init__(self) -> None:
        self._start = _busy_seconds()

    def cores(self) -> float | None:
        """The mean number, of those this process may run on; None where it cannot be measured."""
        end = _busy_seconds()
        if self._start is None or end is None or (passed := end[0] - self._start[0]) < _SHORTEST:
            return None
        return max(0.0, (end[1] - self._start[1]) / passed)

    def report(self) -> None:
        """A line on the threads, and a WARNING where other processes need the same cores; each once.

        A single thread waits for none: it is only slowed down by its share of a core.
        """
        import torch

        threads, affinity, others = torch.get_num_threads(), _affinity(), self.cores()
        if threads > 1 and others is not None and threads + others > affinity + 0.5:
            _say_once(
                logging.WARNING,
                f"{threads} CPU threads, but other processes keep {others:.1f} of {affinity} cores busy: "
                f"training is slower. Stop them, or set OMP_NUM_THREADS={max(1, int(affinity - others))}"
                f"{_advice()}",
            )
        else:
            _say_once(logging.INFO, f"CPU threads: {threads} on {affinity} cores")


_said: set[int] = set()  # levels


def _say_once(level: int, line: str) -> None:
    if all(level > said for said in _said):
        _said.add(level)
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
    """Cores' worth of time that the control groups of this process grant, version 2 or 1."""
    found = []
    for line in _lines(_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        # A container may see its own group as the root, under the path that it has outside.
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
    """Now, and the seconds that all but this process have computed on the cores of this one."""
    if sys.platform != "linux":
        return None
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in _lines(_STAT):
        name, *counts = line.split()
        if name in mine:
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
