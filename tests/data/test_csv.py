"""CSV files: fields as in RFC 4180, and numbers in the columns that formats define."""

from __future__ import annotations

import csv
import io
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, load_rows
from rpo_trainer.data.csv_file import read_csv
from rpo_trainer.data.sources import load_source
from rpo_trainer.errors import DataError
from tests.raising import raises

Row = dict[str, Any]


def read(folder: Path, source: Any, data: bytes | str) -> list[Row]:
    (folder / "rows.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    return load_source(source("rows.csv"), folder, 0).rows


def load(folder: Path, source: Any, data: str, audit: Audit | None = None, **options: Any) -> Any:
    (folder / "rows.csv").write_bytes(data.encode())
    fields = {key: options.pop(key) for key in ("columns", "format") if key in options}
    options = {"kind": "pair", "audit": audit or Audit(), "seed": 0, **options}
    return load_rows([source("rows.csv", **fields)], base_dir=folder, **options)


def test_csv(tmp_path: Path, source: Any) -> None:
    data = 'prompt,chosen,rejected,chosen_reward,rejected_reward\r\n"a ""q"",\nü",007,NA,3,1.5\r\n'
    (row,) = read(tmp_path, source, data)
    assert row == {
        "prompt": 'a "q",\nü', "chosen": "007", "rejected": "NA",
        "chosen_reward": "3", "rejected_reward": "1.5",
    }  # fmt: skip
    assert read(tmp_path, source, b"\xef\xbb\xbf" + data.encode()) == [row]
    (found,) = load(tmp_path, source, data, require_rewards=True)
    assert found["responses"] == ["007", "NA"] and found["rewards"] == [3.0, 1.5]


@pytest.mark.parametrize("rewards", [True, False])
def test_rewards_are_numbers_under_any_name(tmp_path: Path, source: Any, rewards: bool) -> None:
    names = {
        "prompt": "q",
        "chosen": "good",
        "rejected": "bad",
        "chosen_reward": "rg",
        "rejected_reward": "rb",
    }
    audit = Audit()
    data = "q,good,bad,rg,rb\n1,2,3,2.5,1\n"
    (row,) = load(tmp_path, source, data, audit, columns=names, require_rewards=rewards)
    assert (row["prompt"], row["responses"], row["rewards"]) == ("1", ["2", "3"], [2.5, 1.0])
    assert not audit.warnings


def test_ratings_are_numbers_under_any_name(tmp_path: Path, source: Any) -> None:
    data = "prompt,response,s\n1,2,3\n"
    (row,) = load(tmp_path, source, data, kind="rating", columns={"score": "s"})
    assert row["attributes"] == {"score": 3.0} and row["responses"] == ["2"]


def test_one_reward_that_is_not_a_number_leaves_the_others(tmp_path: Path, source: Any) -> None:
    audit = Audit()
    data = "prompt,chosen,rejected,chosen_reward,rejected_reward\nq,a,b,NA,0\np,a,b,2,1\n"
    rows = load(tmp_path, source, data, audit)
    assert [row["rewards"] for row in rows] == [None, [2.0, 1.0]]
    assert audit.warnings["unusable_rewards"].count == 1


def test_empty_fields_of_csv_are_null_unless_they_are_quoted(tmp_path: Path, source: Any) -> None:
    first, second = read(tmp_path, source, 'prompt,response\n1,\n2,""\n')
    assert first == {"prompt": "1", "response": None}
    assert second == {"prompt": "2", "response": ""}


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ('5" pipe,a', '5" pipe'),
        ("a 'b',a", "a 'b'"),
        ('"5"" pipe",a', '5" pipe'),
        ('"a\r\nb",a', "a\r\nb"),
        ("\n\na,a", "a"),
    ],
)
def test_sound_lines(tmp_path: Path, source: Any, line: str, prompt: str) -> None:
    assert read(tmp_path, source, f"prompt,response\n{line}") == [
        {"prompt": prompt, "response": "a"}
    ]


def test_fields_are_those_of_the_standard_library(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = "a,b\n" + "".join(draw.choice('a",\n\r b"') for _ in range(draw.randint(1, 12)))
        (tmp_path / "rows.csv").write_bytes(text.encode())
        try:
            found: Any = [[v or "" for v in r.values()] for r in read_csv(tmp_path / "rows.csv")]
        except DataError:
            found = None
        try:
            wanted: Any = [r for r in csv.reader(io.StringIO(text, newline=""), strict=True) if r][
                1:
            ]
        except csv.Error:
            wanted = None
        if wanted is not None and any(len(row) != 2 for row in wanted):
            wanted = None
        assert found == wanted, text


def test_an_index_without_a_name_is_not_read(tmp_path: Path, source: Any) -> None:
    """The index column that pandas' `to_csv` writes."""
    for name in ("", "Unnamed: 0"):
        audit = Audit()
        (row,) = load(tmp_path, source, f"{name},prompt,response\n7,q,a\n", audit, kind="sft")
        assert (row["prompt"], row["response"]) == ("q", "a")
        told = [(level, text) for level, text in audit.messages() if "Unnamed: 0" in text]
        assert [level for level, _ in told] == [logging.INFO]


@pytest.mark.parametrize(
    ("data", "code", "named", "line"),
    [
        ("", "data.no-rows", "", ""),
        ("prompt,response\n", "data.no-rows", "", ""),
        ("prompt,response\na\n", "data.invalid-csv", " 1 fields", ":2"),
        ("prompt,response\na,b\nc,d,e\n", "data.invalid-csv", " 3 fields", ":3"),
        ('prompt,response\na,"b\nc,d\n', "data.invalid-csv", "not closed", ":2"),
        ('prompt,response\n"q1,a1\n"q2,a2\nq3,a3\n', "data.invalid-csv", "closing", ":3"),
        ('prompt,response\n"q1" said he,a\n', "data.invalid-csv", "closing", ":2"),
        ("prompt,prompt\na,b\n", "data.duplicate-column", "'prompt'", ""),
        ("prompt,\na,b\n", "data.unnamed-column", "", ""),
        (",prompt\na,b\n", "data.unnamed-column", "", ""),
        (b"prompt,response\n\xff,b\n", "data.not-utf8", "0xff", ""),
    ],
)
def test_bad_csv(
    tmp_path: Path, source: Any, data: bytes | str, code: str, named: str, line: str
) -> None:
    with raises(code, DataError, where=str(tmp_path / "rows.csv") + line) as error:
        read(tmp_path, source, data)
    assert named in error.value.what
