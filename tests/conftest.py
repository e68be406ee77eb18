"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real data that may lie beside a checkout; tests that need it skip without it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the real data beside the checkout is absent")
    return path


@pytest.fixture(autouse=True)
def untouched_log() -> None:
    """A command called in a test, or in a fixture, sets the package's logger up for its own stderr."""
    package = logging.getLogger("rpo_trainer")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the tables that tests have recorded as properties, a line each: `table: TITLE` → LINE."""
    reports = [r for reports in terminalreporter.stats.values() for r in reports]
    tables: dict[str, list[str]] = {}
    for report in reports:
        if getattr(report, "when", None) == "call":
            for name, line in report.user_properties:
                if name.startswith("table: "):
                    tables.setdefault(name.removeprefix("table: "), []).append(line)
    for title, lines in tables.items():
        terminalreporter.section(title)
        terminalreporter.line("\n".join(lines))
