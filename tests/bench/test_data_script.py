"""benchmarks/data.py in its smallest setting, and its parts: rows, reads, lines through two sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_scripts import ROOT, run

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("common", "data", "data_rows", "data_measure", "record"):
        sys.modules.pop(name, None)


@pytest.mark.long
def test_starts_of_a_run(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--kind", "k4", "--subjects", "run", "tokenizer"]
    printed, line = run("data.py", *options, "--parts", "cpu", "reads", folder=tmp_path)
    assert "| run | warm |" in printed and "| bar | value | limit |" in printed
    lines = {(one["subject"], one["start"]): one for one in line["cpu"]}
    assert {*lines} == {("run", "cold"), ("run", "warm"), ("tokenizer", "cold")}
    cold = lines["run", "cold"]
    # Imports are measured in another process: their time may exceed the total on a loaded machine.
    assert all(a > 0 for a in [*cold["imports"], *cold["total"]])
    assert [one["process"] for one in line["memory"]] == ["1 process, rank 0"] * 2
    for one in line["memory"]:
        assert all(
            0 < a <= b for a, b in zip(one["private_at_step"], one["private_peak"], strict=True)
        )
        assert all(a < b for a, b in zip(one["private_peak"], one["all"], strict=True))
    reads = line["reads"]
    assert reads["all"] == pytest.approx(reads["digests"] + reads["other"]) and reads["other"] >= 1
    assert reads["opens"] >= 1


@pytest.mark.parametrize(
    ("code", "times", "opens"),
    [
        ("open(path).read(); open(path, 'rb').read()", 2.0, 2),
        ("list(open(path, encoding='utf-8')); open(path + '.other').read()", 1.0, 1),
        ("import pathlib; file = pathlib.Path(path).open('rb'); file.read(50)", 1.0, 1),  # a buffer
        ("open(path, 'rb', buffering=0).read(50)", 0.5, 1),
        ("open(path, 'a').write('')", 0.0, 0),
    ],
)
def test_reads_are_counted(
    code: str, times: float, opens: int, benchmarks: None, tmp_path: Path
) -> None:
    import data_measure

    source, log = tmp_path / "rows.jsonl", tmp_path / "log"
    source.write_text("x" * 99 + "\n")
    Path(f"{source}.other").write_text("other")
    log.mkdir()
    subprocess.run(
        [sys.executable, "-c", f"path = {str(source)!r}; {code}"],
        check=True,
        env=data_measure._environment(source, log),
    )
    reads = data_measure._reads(log, source)
    assert (reads["all"], reads["opens"]) == (times, opens)
    assert reads["digests"] == 0 and reads["other"] == times


def test_reads_for_a_digest_are_separate(benchmarks: None, tmp_path: Path) -> None:
    import data_measure

    source, log = tmp_path / "rows.jsonl", tmp_path / "log"
    source.write_text("x" * 99 + "\n")
    log.mkdir()
    code = f"""
def file_digest(path):
    open(path, "rb").read()
file_digest({str(source)!r}); open({str(source)!r}).read()
"""
    environment = data_measure._environment(source, log)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    reads = data_measure._reads(log, source)
    assert (reads["digests"], reads["other"], reads["opens"]) == (1.0, 1.0, 2)


@pytest.mark.parametrize("kind", ["pair", "sft", "k4"])
def test_rows_differ(kind: str, benchmarks: None, tmp_path: Path) -> None:
    import data_rows

    given = tmp_path / "given.jsonl"
    base = data_rows.base_rows(kind, None)[:3]
    given.write_text("".join(json.dumps(row) + "\n" for row in base))
    data_rows.write_rows(data_rows.base_rows(kind, given), 8, tmp_path / "rows.jsonl")
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8 and all({*row} == {*base[0]} for row in rows)
    texts = [tuple(data_rows.texts_of(row)) for row in rows]
    assert len({text for row in texts for text in row}) == sum(map(len, texts))
    assert all(text.endswith(" (5)") for text in texts[5])
    assert texts[5][0].startswith(next(iter(data_rows.texts_of(base[2]))))
    assert all(row.get("rewards") == base[0].get("rewards") for row in rows)


def test_the_line_through_two_sizes(benchmarks: None) -> None:
    import data

    def entry(cold: float, imports: float) -> dict[str, Any]:
        return {
            "run": {
                "cold": [{"cpu": cold + more, "step": 0.5} for more in (1, 0, -1)],
                "warm": [
                    {"cpu": 9.5, "imports": imports, "step": 0.2},
                    {"cpu": 11.0, "imports": imports + 1, "step": 0.4},
                ],
            }
        }

    rows = [1000, 100_000]
    line, warm = data.cpu_lines(rows, {"1000": entry(10.0, 7.5), "100000": entry(208.0, 7.5)})
    assert line["total"] == [10.0, 208.0] and line["beyond"] == [2.0, 200.0]
    assert line["exponent"] == pytest.approx(1.0) and line["per_row"] == pytest.approx(0.002)
    assert warm["beyond"] == [2.25, 2.25] and line["imports"] == [8.0, 8.0]
    assert line["far"] == pytest.approx(1600.0)


def test_bars(benchmarks: None) -> None:
    import argparse

    import data

    lines = [
        {"subject": subject, "start": start, "total": [1.0, total], "step": [0.0, 3.0], "beyond": [1.0, 3.0]}
        for subject, start, total in [
            ("run", "cold", 23.0), ("run", "warm", 9.0), ("trl", "cold", 20.0),
        ]
    ]  # fmt: skip
    process = {
        "process": "2 processes, rank 1",
        "start": "cold",
        "per_row": 600.0,
        "all": [1, 2**30],
    }
    result = {"cpu": lines, "memory": [process], "reads": {"other": 1.0}}
    found = data.bars(argparse.Namespace(rows=[10, 20], kind="k4"), result)
    assert [(round(value, 2), limit) for _, value, limit in found] == [
        (1.15, 1.15), (1.18, 1.15), (3.0, 2.0), (600.0, 512.0), (1.0, 3.0), (1.0, 1.0),
    ]  # fmt: skip
