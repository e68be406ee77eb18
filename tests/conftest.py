"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rpo_trainer.redact import RedactingHandler

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and subprocesses share it
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def frozen_libraries() -> Iterator[None]:
    """Each training collects garbage several times, and would traverse all imported libraries every time."""
    import datasets  # noqa: F401
    import peft  # noqa: F401

    import rpo_trainer.chain  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory with real data next to a checkout; tests that need it are skipped without it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the real data next to the checkout is absent")
    return path


Injected = Callable[[str, Literal["survived", "stopped"]], None]
FAULTS = "faults injected, and what came of them"


@pytest.fixture
def injected(record_property: Callable[[str, object], None]) -> Injected:
    """`injected(fault, outcome)` adds a line to the summary; call it after the outcome has been asserted.

    `survived`: the outcome is that of an undisturbed run. `stopped`: with the reason, and nothing is lost.
    """
    record_property("injects faults", True)

    def line(fault: str, outcome: Literal["survived", "stopped"]) -> None:
        record_property(f"table: {FAULTS}", f"{outcome:9} {fault}")

    return line


@pytest.fixture(autouse=True)
def untouched_log() -> None:
    """Undo what a command called in a test or a fixture has changed in the package's logger."""
    package = logging.getLogger("rpo_trainer")
    package.handlers, package.propagate = [RedactingHandler()], True
    package.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def same_threads() -> Iterator[None]:
    """A module that changes torch's number of threads must restore it: later tests share the process."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, (
        f"this module leaves torch with {after} threads, it started with {before}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.extras("deepspeed")`: skip the test if this package is not installed."""
    for mark in item.iter_markers("extras"):
        for module in mark.args:
            pytest.importorskip(module, reason=f"requires {module}: the extra `test-all` has it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files with the most slow tests first; started last, they would keep one worker busy alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables that tests have recorded as properties, one line each: `table: TITLE` → LINE."""
    reports = [r for reports in terminalreporter.stats.values() for r in reports]
    tables: dict[str, list[str]] = {}
    for report in reports:
        if getattr(report, "when", None) == "call":
            for name, line in report.user_properties:
                if name.startswith("table: "):
                    tables.setdefault(name.removeprefix("table: "), []).append(line)
    tried = [r for r in reports if getattr(r, "when", None) == "call" and "/test_bad_" in r.nodeid]
    if tried:
        right = sum(report.passed for report in tried)
        tables["bad inputs"] = [f"{len(tried)} tried, {right} answered as they must be"]
    if FAULTS in tables:
        outcomes = Counter(line.split()[0] for line in tables[FAULTS])
        outcomes["failed"] = sum(
            report.failed and ("injects faults", True) in report.user_properties
            for report in reports
            if getattr(report, "when", None) == "call"
        )
        parts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        tables[FAULTS].append(f"{outcomes.total()} injected: {parts}")
    for title, lines in tables.items():
        terminalreporter.section(title)
        terminalreporter.line("\n".join(lines))
