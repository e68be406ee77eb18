"""Runs a process of benchmarks/data.py and samples its memory and that of its ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
_INTERVAL = 0.2  # seconds between samples of memory
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass
class Measured:
    """What the ranks reported at their first step, by rank, and what was sampled until then, in bytes."""

    reports: dict[str, dict[str, Any]]
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    total_peak: int = 0
    reads: dict[str, float] = field(default_factory=dict)

    @property
    def cpu(self) -> float:
        """CPU seconds of all ranks."""
        return float(sum(report["cpu"] for report in self.reports.values()))

    def figures(self) -> dict[str, Any]:
        """Return the figures for the record."""
        ranks = {
            rank: {
                "marks": report["marks"],
                "at_step": {**_parts(report["memory"]), "DataMapped": report["memory"]["DataMapped"]},
                "peak": self._peak(rank, _parts(report["memory"])),
            }
            for rank, report in sorted(self.reports.items())
            if "memory" in report
        }  # fmt: skip
        marks = [report.get("marks", {}) for report in self.reports.values()]
        imports = sum(one.get("imported", 0.0) for one in marks)
        step = sum(one["first_step"] - one["train_begins"] for one in marks if one)
        return {
            "cpu": self.cpu,
            "imports": imports,
            "step": step,
            "ranks": ranks,
            "total_peak": self.total_peak,
            "reads": self.reads,
        }

    def _peak(self, rank: str, at_step: dict[str, int]) -> dict[str, int]:
        sampled = self.peaks.get(rank, {})
        return {name: max(value, sampled.get(name, 0)) for name, value in at_step.items()}


def _parts(rollup: dict[str, int]) -> dict[str, int]:
    """Return private (anonymous) memory, USS, shared memory, and the proportional set size."""
    return {
        "Anonymous": rollup["Anonymous"],
        "Uss": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "Shared": rollup["Shared_Clean"] + rollup["Shared_Dirty"],
        "Pss": rollup["Pss"],
    }


def measure(
    command: list[str],
    source: Path,
    place: Path,
    *,
    ranks: int = 1,
    preload: Path | None = None,
    to_end: bool = False,
) -> Measured:
    """Run data_child.py with a command.

    Args:
        source: the file whose reads are counted.
        place: working directory; caches of `datasets` go there too.
        ranks: number of processes, started by torchrun if there are several.
        preload: names of modules that are imported first.
        to_end: run the training to its end; nothing is reported then but the reads.
    """
    log = place / "log"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words = [
        sys.executable, *(launcher if ranks > 1 else []), str(HERE / "data_child.py"), *command
    ]  # fmt: skip
    environment = _environment(source, log)
    if preload is not None:
        environment["BENCH_DATA_PRELOAD"] = str(preload)
    if to_end:
        environment["BENCH_DATA_TO_END"] = "1"
    with (log / "output").open("w") as output:
        process = subprocess.Popen(words, cwd=place, env=environment, stdout=output, stderr=output)
        found = Measured({})
        while process.poll() is None:
            _sample(process.pid, log, found)
            time.sleep(_INTERVAL)
    for path in log.glob("rank-*.json"):
        found.reports[path.stem.removeprefix("rank-")] = json.loads(path.read_text())
    if process.returncode or len(found.reports) != (0 if to_end else ranks):
        text = (log / "output").read_text(errors="replace")[-4000:]
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{text}")
    found.reads = _reads(log, source)
    return found


def _environment(source: Path, log: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_RANK)}
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(log.parent / "datasets-cache"),
        "BENCH_DATA_LOG": str(log),
        "BENCH_DATA_SOURCES": json.dumps([str(source.resolve())]),
    }


def _sample(launcher: int, log: Path, found: Measured) -> None:
    """Update the peaks: of each rank, and of all processes together."""
    ranks = {path.read_text(): path.stem.removeprefix("rank-") for path in log.glob("rank-*.pid")}
    total = 0
    for process in _tree(launcher):
        try:
            parts = _parts(rollup(process.pid))
        except (OSError, KeyError):  # has ended
            continue
        total += parts["Pss"]
        if rank := ranks.get(str(process.pid)):
            peak = found.peaks.setdefault(rank, parts)
            found.peaks[rank] = {name: max(value, peak[name]) for name, value in parts.items()}
    found.total_peak = max(found.total_peak, total)


def rollup(pid: int) -> dict[str, int]:
    """Return the fields of /proc/PID/smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _tree(launcher: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(launcher)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _reads(log: Path, source: Path) -> dict[str, float]:
    """Return bytes read of the source over its size: in all, for digests, and otherwise; and the opens."""
    found = {"all": 0.0, "digests": 0.0, "other": 0.0, "opens": 0}
    for path in log.glob("read-*.json"):
        times = int.from_bytes(path.with_suffix(".count").read_bytes(), "little")
        share = times / source.stat().st_size
        callers = json.loads(path.read_text())["callers"]
        inner = callers[0].rpartition(":")[2] if callers else ""
        found["digests" if "digest" in inner else "other"] += share
        found["all"] += share
        found["opens"] += 1
    return found
