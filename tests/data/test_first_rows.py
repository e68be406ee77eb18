"""Only the first rows of a source are read where no others are needed."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest

from rpo_trainer.data import Audit, load_rows
from rpo_trainer.data.sources import FirstRows, load_source
from rpo_trainer.errors import DataError
from tests.raising import raises

ROWS_OF_MANY = [
    {"prompt": f"{number} " + 'a "quoted", text\nof two lines é' * 20, "response": str(number)}
    for number in range(5_000)
]


def write_many(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = folder / f"many.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=max(7, len(rows) // 10)
        )
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "json", "parquet", "saved"])
@pytest.mark.parametrize("limit", [1, 12, 20, 21])
def test_the_first_rows_are_those_of_all(
    kind: str, limit: int, tmp_path: Path, source: Any
) -> None:
    path = write_many(tmp_path, kind, ROWS_OF_MANY[:20])
    whole = load_source(source(path.name), tmp_path, 0)
    first = load_source(source(path.name), tmp_path, 0, limit)
    assert whole.rows == ROWS_OF_MANY[:20] and not whole.more
    assert first.rows == whole.rows[:limit] and first.places == whole.places[:limit]
    assert (first.more, first.arrow, first.untyped) == (limit < 20, whole.arrow, whole.untyped)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "saved"])
def test_the_rest_of_a_file_is_not_read(kind: str, tmp_path: Path, source: Any) -> None:
    random_text = random.Random(0).randbytes
    rows = [{**row, "response": random_text(500).hex()} for row in ROWS_OF_MANY]
    path = write_many(tmp_path, kind, rows)
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())

    def bytes_read() -> int:
        (line,) = [x for x in Path("/proc/self/io").read_text().splitlines() if x[:6] == "rchar:"]
        return int(line.split()[1])

    load_source(source(path.name), tmp_path, 0, 2)  # imports
    tracemalloc.start()
    before = bytes_read()
    found = load_source(source(path.name), tmp_path, 0, 2)
    taken = bytes_read() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rows == rows[:2] and found.more
    # Of a parquet file, the first of ten row groups has a dictionary with all its texts.
    assert taken < size // (5 if kind == "parquet" else 15)
    assert peak < size // 10


def test_a_fault_after_the_first_rows_is_not_found(tmp_path: Path, source: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\nno json\n{"a": 5}\n')
    assert load_source(source(path.name), tmp_path, 0, 2).rows == [{"a": 1}, {"a": 2}]
    with raises("data.invalid-json", DataError):
        load_source(source(path.name), tmp_path, 0, 4)
    (tmp_path / "rows.csv").write_text("a,b\n" + "1,2\n" * 50_000 + "1\n")
    assert load_source(source("rows.csv"), tmp_path, 0, 2).rows == [{"a": "1", "b": "2"}] * 2
    with raises("data.invalid-csv", DataError):
        load_source(source("rows.csv"), tmp_path, 0, 50_001)
    (tmp_path / "rows.csv").write_text("a,b\n1\n" + "1,2\n" * 50_000)
    with raises("data.invalid-csv", DataError):
        load_source(source("rows.csv"), tmp_path, 0, 2)


@pytest.mark.parametrize(
    ("max_rows", "count", "rows", "more"),
    [
        (None, 5, 5, True),
        (3, 5, 3, False),
        (5, 5, 5, False),
        (9, 5, 5, True),
        (None, 20, 20, False),
    ],
)
def test_max_rows_is_applied_first(
    max_rows: int | None, count: int, rows: int, more: bool, tmp_path: Path, source: Any
) -> None:
    path = write_many(tmp_path, "jsonl", ROWS_OF_MANY[:20])
    first, spec = FirstRows(count), source(path.name, max_rows=max_rows)
    found = load_rows([spec], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0, first=first)
    assert (len(found), first.more) == (rows, more)


def test_a_row_joined_from_several_is_left_out_if_it_may_go_on(tmp_path: Path, source: Any) -> None:
    rated = [
        {"prompt": str(number // 2), "response": str(number), "helpfulness": number % 2}
        for number in range(12)
    ]
    path = write_many(tmp_path, "jsonl", rated)

    def responses(first: FirstRows | None) -> list[int]:
        spec = source(path.name, format="helpsteer2_pairs")
        found = load_rows(
            [spec], kind="pair", base_dir=tmp_path, audit=Audit(), seed=0, first=first
        )
        return [len(row["responses"]) for row in found]

    assert responses(None) == [2] * 6 == responses(FirstRows(12))
    # With 6 rows too: a third response to the third prompt could follow.
    assert responses(FirstRows(5)) == [2] * 2 == responses(FirstRows(6))
