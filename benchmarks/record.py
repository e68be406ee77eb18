"""Appends a JSON line for each run, with what is needed to interpret it; measures memory in use."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import DEVICE

_PACKAGES = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "rpo-trainer")


def append(args: argparse.Namespace, **figures: Any) -> None:
    """Append date, command, device, versions and the figures to `--json FILE`, if given."""
    if args.json is None:
        return
    line = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "script": Path(sys.argv[0]).name,
        "command": " ".join(_without_json(sys.argv[1:])),
        "device": _device(),
        "versions": _versions(),
        **figures,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with args.json.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _without_json(words: list[str]) -> list[str]:
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if "--json" not in (before, word.split("=")[0]):
            kept.append(word)
    return kept


def _device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(mine: list[float], other: list[float]) -> tuple[float, float, float]:
    """Return median, minimum and maximum of other / mine, step by step."""
    pairs = [b / a for a, b in zip(mine, other, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def memory_now() -> int:
    """Return the bytes in use: by the process on a CPU, allocated on a GPU."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if pages.exists() else 0


def mib(count: float) -> str:
    """Format bytes as MiB."""
    return f"{count / 2**20:,.0f} MiB"
