"""Formatting of numbers."""

from __future__ import annotations


def short(value: float | None, digits: int = 2) -> str:
    """Format with `digits` decimals, small values as 1e-05; an en dash for None."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}".replace("-", "−", 1) if value < 0 else f"{value:.1e}"
    return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    """Format like `short`, with a plus sign for values that are not negative."""
    text = short(value, digits)
    return text if value is None or value < 0 else f"+{text}"


def duration(seconds: float | None) -> str:
    """Format seconds as `42 s`, `3:20 min` or `5:07 h`."""
    if seconds is None:
        return "–"
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60}:{rounded % 60:02d} min"
    return f"{rounded // 3600}:{rounded % 3600 // 60:02d} h"


def size(number_of_bytes: int | None) -> str:
    """Format bytes as MiB or GiB."""
    if number_of_bytes is None:
        return "–"
    mib = number_of_bytes / 2**20
    return f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def counted(number: int, noun: str) -> str:
    """Format a number of things: `1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
