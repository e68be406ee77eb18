from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import sources
from rpo_trainer.data.sources import load_source
from rpo_trainer.errors import DataError

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "ç 🙂", "response": "ד"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def load(path: Path, source: Any, **fields: Any) -> sources.RawSource:
    return load_source(source(path.name, **fields), path.parent, 0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, source: Any, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        data = json.dumps(ROWS).encode() if name.endswith(".json") else LINES
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = load(path, source)
    assert found.rows == ROWS
    assert found.name == name
    assert found.places == ([1, 2] if "jsonl" in name else [0, 1])


def test_saved_dataset_with_and_without_splits(tmp_path: Path, source: Any) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert load(tmp_path / "one", source).rows == ROWS
    assert load(tmp_path / "two", source).rows == ROWS
    assert load(tmp_path / "two", source, split="test").rows == ROWS[1:]
    with pytest.raises(DataError, match="no split 'dev'") as error:
        load(tmp_path / "two", source, split="dev")
    assert "train | test" in str(error.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        load(tmp_path / "other", source)


def test_hub_name_goes_to_the_hub_and_its_failure_is_explained(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def fake(name: str, split: str | None) -> Any:
        asked.append((name, split))
        if name == "someone/absent":
            raise ConnectionError("no network")
        data = datasets.Dataset.from_list(ROWS)
        return data if split else datasets.DatasetDict({"train": data})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_source(source("someone/data"), tmp_path, 0).rows == ROWS
    assert load_source(source("someone/data", split="test"), tmp_path, 0).rows == ROWS
    assert asked == [("someone/data", None), ("someone/data", "test")]
    with pytest.raises(DataError, match="the hub gives no data set of this name") as error:
        load_source(source("someone/absent"), tmp_path, 0)
    assert "no network" in str(error.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "deep/er/absent", "../absent", "absent.csv"])
def test_absent_file_is_not_taken_for_a_hub_name(tmp_path: Path, source: Any, name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_source(source(name), tmp_path, 0)


def test_task_rows(source: Any) -> None:
    spec = source(task="quickstart/code", size=5)
    first, again = load_source(spec, None, 3), load_source(spec, None, 3)
    assert len(first.rows) == 5
    assert first.rows == again.rows
    assert first.rows != load_source(spec, None, 4).rows
    own = source(task="quickstart/code", size=5, seed=3)
    assert load_source(own, None, 4).rows == first.rows


BAD = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n  \n\r\n", "only blank lines"),
    "cut": (LINES[:-10], r"bad\.jsonl:2: the last line is cut"),
    "cut_in_a_word": (b'{"a": 1}\n{"a": tr', r"bad\.jsonl:2: the last line is cut"),
    "not_json": (b'{"a": 1}\n{a: 1}\n{"a": 1}\n', r"bad\.jsonl:2: not valid JSON"),
    "not_utf8": (b'{"a": 1}\n{"a": "\xff"}\n', r"bad\.jsonl:2: not UTF-8: byte 0xff at offset 16"),
    "utf16": ('{"a": 1}\n'.encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    "surrogate": (b'{"a": ["\\ud83d"]}\n', r"bad\.jsonl:1: a text holds half of a surrogate"),
    "nan": (b'{"a": 1}\n\n{"a": NaN}\n', r"bad\.jsonl:3: NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}\n', "-Infinity is not JSON"),
    "twice": (b'{"a": {"b": 1, "b": 2}}\n', r"bad\.jsonl:1: the key 'b' is given twice"),
    "not_object": (b"[1]\n", r"bad\.jsonl:1: the row is a list, not an object"),
    "gzip": (gzip.compress(LINES), r"the name ends with \.jsonl but the content is gzip"),
    "parquet": (b"PAR1....PAR1", "the content is parquet"),
    "deep": (b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_lines(tmp_path: Path, source: Any, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path, source)


BAD_OTHER = {
    "a.json": (b'{"a": 1}\n{"a": 2}\n', "an object, not a list"),
    "b.json": (b"3", "a number, not a list"),
    "c.json": (b'[{"a": 1}, 2]', "item 1: the row is a number"),
    "d.json": (b'[{"a": 1},\n {"a": ', r"d\.json:2: the last line is cut"),
    "e.json": (b"  \n", "only blank lines"),
    "f.json": (b"[]", "no rows"),
    "a.jsonl.gz": (LINES, "the content is text"),
    "b.jsonl.gz": (gzip.compress(LINES)[:-12], "the gzip file is cut or damaged"),
    "c.jsonl.gz": (gzip.compress(b""), "the file is empty"),
    "a.parquet": (LINES, "the content is text"),
    "b.parquet": (b"PAR1 and then nothing", "the parquet file is cut"),
    "c.parquet": (b"PAR1 nothing that makes sense PAR1", "the parquet file is damaged"),
    "a.csv": (b"a,b\n", "unknown kind of file '.csv'"),
}


@pytest.mark.parametrize("name", BAD_OTHER)
def test_bad_files_of_other_kinds(tmp_path: Path, source: Any, name: str) -> None:
    content, message = BAD_OTHER[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name, source)


def test_line_over_the_limit(tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 20)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 50 + b'"}\n')
    with pytest.raises(DataError, match=r"long\.jsonl:2: the line is longer than 20 bytes"):
        load(path, source)


def test_what_must_work(tmp_path: Path, source: Any) -> None:
    """CRLF, a byte-order mark, blank lines between, line separators and NUL inside texts."""
    folder = tmp_path / "mit Leerzeichen ü 🙂"
    folder.mkdir()
    path = folder / "rows one.jsonl"
    row = {"a": "x\u2028y\u0085z\x00", "b": "🙂 e\u0301 שלום"}
    text = json.dumps(row, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n{text}".encode())
    found = load(path, source)
    assert found.rows == [row, row]
    assert found.places == [1, 3]
    escaped = tmp_path / "pair.jsonl"
    escaped.write_bytes(b'{"a": "\\ud83d\\ude42"}\n')  # a whole pair is one character
    assert load(escaped, source).rows == [{"a": "🙂"}]


def test_a_file_has_no_splits(tmp_path: Path, source: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match="a file has no splits"):
        load(tmp_path / "rows.jsonl", source, split="train")
