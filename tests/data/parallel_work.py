"""Work for other processes, which import it by name."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def square(numbers: list[int]) -> list[int]:
    return [n * n for n in numbers]


def where(_: int) -> int:
    return os.getpid()


def handlers(_: int) -> tuple[Any, Any, str | None]:
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threads


@dataclass
class Killed:
    """Kills the process that gets number 5, except the parent."""

    parent: int

    def __call__(self, number: int) -> int:
        if number == 5 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * 10


@dataclass
class Recorded:
    """Writes a file for each process and never ends."""

    folder: Path

    def __call__(self, _: int) -> None:
        import time

        (self.folder / str(os.getpid())).touch()
        time.sleep(600)
