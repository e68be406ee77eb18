"""System panel of the page: hardware, versions, launcher, precision, time and memory."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_trainer.report.collect import RunResults
from rpo_trainer.report.formatting import counted, duration, size
from rpo_trainer.stages.record import SystemRecord


@dataclass(frozen=True)
class SystemView:
    """What a group of stages was trained with: (label, value) pairs."""

    stages: str
    entries: list[tuple[str, str]]


def system_views(run: RunResults) -> list[SystemView]:
    """Return one view per system; stages that share a system are grouped."""
    groups: list[tuple[SystemRecord, list[str]]] = []
    for stage in run.stages:
        system = stage.record.system
        if system is None:
            continue
        names = next((names for known, names in groups if known == system), None)
        if names is None:
            groups.append((system, [stage.name]))
        else:
            names.append(stage.name)
    return [
        SystemView("" if len(groups) == 1 else ", ".join(names), list(_entries(system).items()))
        for system, names in groups
    ]


def totals(run: RunResults) -> list[tuple[str, str]]:
    """Return the total time and the largest peak memory of the run."""
    seconds = sum(stage.record.seconds or 0.0 for stage in run.stages)
    memory = max((stage.record.peak_memory_bytes or 0 for stage in run.stages), default=0)
    found = [("total time", duration(seconds))] if seconds else []
    return found + ([("peak memory", f"{size(memory)} per process")] if memory else [])


def _entries(system: SystemRecord) -> dict[str, str]:
    devices = [f"{count} × {name}" for name, count in system.devices.items()]
    cores = counted(system.cores, "core") if system.cores else ""
    threads = counted(system.threads, "thread") if system.threads else ""
    shown = {
        "devices": ", ".join(devices),
        "CPU per process": ", ".join(filter(None, (cores, threads))),
        "host memory": size(system.memory_bytes) if system.memory_bytes else "",
        "platform": system.platform or "",
        "launcher": system.launcher or "",
        "engine": system.engine or "",
        "processes": "" if system.world_size is None else str(system.world_size),
        "precision": system.precision or "",
        "versions": ", ".join(f"{name} {version}" for name, version in system.libraries.items()),
    }
    return {label: value for label, value in shown.items() if value}
