"""What a verdict is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "info", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One statement about a stage; `advice` says what to change."""

    stage: str
    level: Level
    text: str
    advice: str | None = None
