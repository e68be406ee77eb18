"""Log lines about the data of stages: each is logged once, in one line for stages with the same data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.chain.data_log import DataLog
from rpo_trainer.data import Audit
from rpo_trainer.recipe import Stage, expand_stages
from tests.chain import tiny


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in expand_stages(tiny.load(tmp_path).recipe)}


def audit(dropped: int = 2, **warnings: int) -> Audit:
    made = Audit()
    made.add_read("file", 10)
    for number in range(10 - dropped):
        made.keep("file")
        made.add_lengths(number, [number])
    for number in range(dropped):
        made.drop("equal", f"row-{number}")
    for reason, count in warnings.items():
        for number in range(count):
            made.warn(reason, f"row-{number}")
    return made


def told(caplog: pytest.LogCaptureFixture, log: DataLog, *args: Any) -> list[logging.LogRecord]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log.log(*args)
    return list(caplog.records)


def test_a_round_with_the_same_findings_is_one_warning_with_its_counts(
    stages: dict[str, Stage], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLog()
    first = told(caplog, data, stages["rpo-1"], audit(2), None, "[4/5 rpo-1]")
    assert [record.levelno for record in first] == [logging.INFO, logging.WARNING]
    (line,) = told(caplog, data, stages["rpo-2"], audit(3), None, "[5/5 rpo-2]")
    assert line.levelno == logging.WARNING
    for token in ("[5/5 rpo-2]", "rpo-1", "10", "7", "3"):
        assert token in line.getMessage()


def test_nothing_dropped_is_no_warning(
    stages: dict[str, Stage], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLog()
    told(caplog, data, stages["rpo-1"], audit(2), None, "")
    (line,) = told(caplog, data, stages["rpo-2"], audit(0), None, "")
    assert line.levelno == logging.INFO


def test_a_new_finding_brings_all_lines(
    stages: dict[str, Stage], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLog()
    first = told(caplog, data, stages["rpo-1"], audit(2), None, "[rpo-1]")
    again = told(caplog, data, stages["rpo-2"], audit(2, blank_response=1), None, "[rpo-2]")
    assert len(again) == len(first) == 2
    assert "blank" in again[1].getMessage() and "blank" not in first[1].getMessage()


def test_other_data_is_reported_in_full(
    stages: dict[str, Stage], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLog()
    first = told(caplog, data, stages["rpo-1"], audit(2), None, "x")
    other = told(caplog, data, stages["dpo"], audit(2), None, "x")
    assert len(other) == len(first)


def test_held_out_findings_count_too(
    stages: dict[str, Stage], caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLog()
    told(caplog, data, stages["rpo-1"], audit(2), audit(0), "")
    assert len(told(caplog, data, stages["rpo-2"], audit(2), audit(1), "")) > 2
