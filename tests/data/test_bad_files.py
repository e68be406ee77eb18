"""Each bad file is refused with an error code, its location, and details of the fault."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, json_file, load_rows
from rpo_trainer.errors import DataError
from tests.raising import raises

ROW = b'{"prompt": "a", "response": "b"}\n'
Refused = Callable[..., DataError]


@pytest.fixture
def refused(tmp_path: Path, source: Any) -> Refused:
    """Return the error for a source that must be refused.

    `code` is that of the error, `place` its place, without the folder's name (None: the file's name).
    """

    def load(
        code: str, name: str, content: bytes | None = None, place: str | None = None
    ) -> DataError:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        where = f"{tmp_path}/{place or name}"
        with raises(code, DataError, where=where, exit_code=3) as error:
            load_rows([source(name)], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0)
        found = error.value
        assert isinstance(found, DataError) and found.fix
        return found

    return load


def test_absent(refused: Refused) -> None:
    for name in ("rows.jsonl", "deep/rows.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"):
        refused("data.no-such-file", name)


def test_absent_with_another_of_nearly_that_name(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "prefs.jsonl").write_text("{}")
    assert "`prefs.jsonl`" in refused("data.no-such-file", "pref.jsonl").what


def test_a_link_to_nowhere(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "nowhere")
    refused("data.no-such-file", "rows.jsonl")


def test_empty(refused: Refused) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"):
        refused("data.no-rows", name, b"")


def test_blank_lines_only(refused: Refused) -> None:
    for name, content in (
        ("rows.jsonl", b"\n  \n\t\r\n"),
        ("rows.json", b"  \n\n"),
        ("rows.jsonl.gz", gzip.compress(b"\n\n")),
    ):
        assert "blank" in refused("data.no-rows", name, content).what


def test_truncated_last_line(refused: Refused) -> None:
    error = refused("data.damaged-file", "rows.jsonl", ROW + ROW + ROW[:-8], "rows.jsonl:3")
    assert "Unterminated" in error.what and "column 17" in error.what


def test_a_line_in_the_middle_that_is_not_json(refused: Refused) -> None:
    content = ROW + b'{"prompt": "a"\n' + ROW
    error = refused("data.invalid-json", "rows.jsonl", content, "rows.jsonl:2")
    assert "','" in error.what and "column 15" in error.what
    error = refused("data.invalid-json", "rows.jsonl", ROW.strip() + ROW, "rows.jsonl:1")
    assert "column 33" in error.what


def test_bytes_that_are_not_utf8(refused: Refused) -> None:
    wrong = ROW.replace(b"b", b"\xe9")
    offset = len(ROW) + ROW.index(b"b")
    # The offset is in the text, not in the compressed bytes.
    for name, content, place, at in (
        ("rows.jsonl", ROW + wrong, "rows.jsonl:2", offset),
        ("rows.json", b'[{"a": "\xe9"}]', "rows.json", 8),
        ("rows.jsonl.gz", gzip.compress(ROW + wrong), "rows.jsonl.gz:2", offset),
    ):
        error = refused("data.not-utf8", name, content, place)
        assert "0xe9" in error.what and f"offset {at}" in error.what


def test_utf16(refused: Refused) -> None:
    content = ROW.decode().encode("utf-16")
    error = refused("data.not-utf8", "rows.jsonl", content, "rows.jsonl:1")
    assert "0xff" in error.what and "offset 0" in error.what


def test_a_parquet_column_that_is_not_utf8(refused: Refused, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    offsets = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    parquet.write_table(pa.table({"prompt": ["a"], "response": column}), tmp_path / "rows.parquet")
    error = refused("data.not-utf8", "rows.parquet")
    assert "'response'" in error.what and "string index 0" in error.what


def test_lone_surrogates(refused: Refused) -> None:
    half = b'{"prompt": "a", "response": ["\\ud83d"]}\n'
    refused("data.lone-surrogate", "rows.jsonl", ROW + half, "rows.jsonl:2")
    refused("data.lone-surrogate", "rows.jsonl", b'{"\\uDE42": 1}\n', "rows.jsonl:1")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_nan_literals(refused: Refused, literal: str) -> None:
    row = b'{"prompt": "a", "response": "b", "reward": %s}\n' % literal.encode()
    error = refused("data.not-finite", "rows.jsonl", ROW + row, "rows.jsonl:2")
    assert error.what.split()[0] == literal


def test_a_key_twice_in_a_row(refused: Refused) -> None:
    row = b'{"prompt": "a", "response": "b", "prompt": "c"}\n'
    error = refused("data.duplicate-key", "rows.jsonl", ROW + row, "rows.jsonl:2")
    assert "'prompt'" in error.what
    nested = b'{"messages": [{"role": "user", "content": "a", "role": "user"}]}\n'
    assert "'role'" in refused("data.duplicate-key", "rows.jsonl", nested, "rows.jsonl:1").what


def test_a_column_twice_in_parquet(refused: Refused, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "'text'" in refused("data.duplicate-column", "rows.parquet").what


def test_gzip_or_parquet_under_a_wrong_name(refused: Refused) -> None:
    packed, table = gzip.compress(ROW), b"PAR1....PAR1"
    for name, ending, content, found in (
        ("rows.jsonl", ".jsonl", packed, "gzip"),
        ("rows.jsonl", ".jsonl", table, "parquet"),
        ("rows.json", ".json", packed, "gzip"),
        ("rows.jsonl.gz", ".jsonl.gz", ROW, "text"),
        ("rows.jsonl.gz", ".jsonl.gz", table, "parquet"),
        ("rows.parquet", ".parquet", ROW, "text"),
        ("rows.parquet", ".parquet", packed, "gzip"),
    ):
        words = refused("data.wrong-suffix", name, content).what.replace(",", "").split()
        assert ending in words and words[-1] == found


def test_truncated_or_damaged_gzip(refused: Refused) -> None:
    packed = gzip.compress(ROW * 100, mtime=0)
    assert "ended before" in refused("data.damaged-file", "rows.jsonl.gz", packed[:-9]).what
    flipped = packed[:-8] + bytes(4) + packed[-4:]
    assert "CRC" in refused("data.damaged-file", "rows.jsonl.gz", flipped).what


def test_truncated_or_damaged_parquet(refused: Refused, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [str(i) * 500 for i in range(500)]}), path)
    whole = path.read_bytes()
    half = len(whole) // 2
    assert " truncated" in refused("data.damaged-file", "rows.parquet", whole[:half]).what
    zeroed = whole[:half] + bytes(2000) + whole[half + 2000 :]
    error = refused("data.damaged-file", "rows.parquet", zeroed)
    assert " truncated" not in error.what and error.what.endswith(")")  # message of the library


def test_shards_that_disagree_on_columns(refused: Refused, tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([{"text": "a"}] * 4)
    one.save_to_disk(str(tmp_path / "data"), num_shards=2)
    other = datasets.Dataset.from_list([{"text": "a", "extra": "b"}] * 2)
    other.save_to_disk(str(tmp_path / "other"))
    shard = "data-00001-of-00002.arrow"
    shutil.copy(tmp_path / "other" / "data-00000-of-00001.arrow", tmp_path / "data" / shard)
    error = refused("data.different-shards", "data")
    assert "data-00000-of-00002.arrow has text;" in error.what
    assert f"{shard} has text, extra" in error.what


def test_a_truncated_or_missing_shard(refused: Refused, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}] * 4).save_to_disk(
        str(tmp_path / "data"), num_shards=2
    )
    shard = tmp_path / "data" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:50])
    refused("data.damaged-file", "data")
    shard.unlink()
    assert "[Errno 2]" in refused("data.damaged-file", "data").what


def test_a_line_over_the_limit(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_LINE_BYTES", 40)
    content = ROW + ROW.replace(b"b", b"b" * 50)
    assert "40" in refused("data.line-too-long", "rows.jsonl", content, "rows.jsonl:2").what


def test_a_number_of_thousands_of_digits(refused: Refused) -> None:
    row = b'{"text": "a", "id": %s}\n' % (b"1" * 5000)
    refused("data.huge-number", "rows.jsonl", row, "rows.jsonl:1")


def test_nested_too_deeply(refused: Refused) -> None:
    refused("data.nested-too-deeply", "rows.jsonl", b"[" * 100_000 + b"\n", "rows.jsonl:1")


def test_lines_that_are_not_objects(refused: Refused) -> None:
    for line, kind in (
        (b"[1]", "a list"),
        (b'"a"', "a text"),
        (b"1", "a number"),
        (b"null", "null"),
    ):
        content = ROW + line + b"\n"
        error = refused("data.row-not-object", "rows.jsonl", content, "rows.jsonl:2")
        assert f" {kind}," in error.what


def test_json_that_is_not_a_list(refused: Refused) -> None:
    error = refused("data.not-a-list", "rows.json", ROW)
    assert "an object," in error.what and ".jsonl" in str(error.fix)
    assert "a number," in refused("data.not-a-list", "rows.json", b"3").what
    refused("data.no-rows", "rows.json", b"[]")


def test_places_in_a_json_list(refused: Refused) -> None:
    refused("data.row-not-object", "rows.json", b'[{"a": 1}, 2]', "rows.json, item 1")
    refused("data.damaged-file", "rows.json", b'[{"a": 1},\n {"a": ', "rows.json:2")


def test_other_kinds_of_files(refused: Refused) -> None:
    error = refused("data.unknown-suffix", "rows.tsv", b"a\tb\n")
    assert "'.tsv'" in error.what and ".jsonl, .json, .jsonl.gz, .parquet, .csv" in str(error.fix)


def test_unreadable(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "rows.jsonl").write_bytes(ROW)
    monkeypatch.setattr(Path, "open", no)
    assert "Permission denied" in refused("data.unreadable-file", "rows.jsonl").what


def test_a_directory_that_is_not_a_data_set(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    error = refused("data.not-a-data-set", "rows.jsonl")
    assert ".jsonl, .json, .jsonl.gz, .parquet, .csv" in str(error.fix)


# ---------------------------------------------------------------- accepted files


@pytest.mark.parametrize(
    "content",
    [
        ROW.replace(b"\n", b"\r\n") * 2,
        b"\xef\xbb\xbf" + ROW + ROW,
        b"\n" + ROW + b"  \n" + ROW.strip(),
    ],
    ids=["CRLF", "byte-order mark", "blank lines between, none at the end"],
)
def test_lines_that_must_work(tmp_path: Path, source: Any, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    rows = load_rows([source("rows.jsonl")], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0)
    assert [(row["prompt"], row["response"]) for row in rows] == [("a", "b")] * 2


def test_paths_that_must_work(tmp_path: Path, source: Any) -> None:
    """Paths with spaces and Unicode, and relative paths."""
    folder = tmp_path / "mit Leerzeichen ü 🙂"
    (folder / "recipes").mkdir(parents=True)
    (folder / "zwei Zeilen é.jsonl").write_bytes(ROW)
    for path in ("../zwei Zeilen é.jsonl", str(folder / "zwei Zeilen é.jsonl")):
        rows = load_rows(
            [source(path)], kind="sft", base_dir=folder / "recipes", audit=Audit(), seed=0
        )
        assert rows[0]["id"] == "zwei Zeilen é.jsonl:1"


def test_characters_that_must_work(tmp_path: Path, source: Any) -> None:
    row = {"prompt": "🙂 e\u0301 שלום\u2028", "response": "NUL \x00 \u0085 👩‍👩‍👧"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "escaped.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for name in ("rows.jsonl", "escaped.jsonl"):
        (found,) = load_rows([source(name)], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0)
        assert {key: found[key] for key in row} == row
