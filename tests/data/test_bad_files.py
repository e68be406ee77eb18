"""What each bad file must get: where, what, why and how to fix it, word by word."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data import Audit, load_rows, sources
from rpo_trainer.errors import DataError

ROW = b'{"prompt": "a", "response": "b"}\n'
AGAIN = "fix: write or copy the file again"
NO_ROWS = "why: without its rows there is nothing to train or measure on"
BY_NAME = "why: how a file is read follows from its name"
LISTED = "why: a file of this name holds its rows as one list"
PART = "why: a part of the rows would be trained on as if it were all"


@pytest.fixture
def refused(tmp_path: Path, source: Any) -> Any:
    """The message for a source that must be refused, with the folder's name left out."""

    def load(name: str, content: bytes | None = None, **fields: Any) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            load_rows(
                [source(name, **fields)], kind="sft", base_dir=tmp_path, audit=Audit(), seed=0
            )
        assert error.value.exit_code == 3
        assert error.value.where and error.value.why and error.value.fix
        return str(error.value).replace(f"{tmp_path}/", "")

    return load


def reason(message: str) -> str:
    """What a library says is wrong, in the brackets of our words."""
    inner = message.split("(", 1)[1].split("\n")[0].rsplit(")", 1)[0]
    assert inner
    return inner


def text(*lines: str) -> str:
    return "\n  ".join(lines)


def test_absent(refused: Any) -> None:
    fix = "fix: give a path relative to the recipe's folder (overrides too), or a hub name"
    for name in ("rows.jsonl", "deep/rows.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"):
        assert refused(name) == text(f"{name}: no such file", NO_ROWS, fix)


def test_absent_with_another_of_nearly_that_name(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "prefs.jsonl").write_text("{}")
    assert refused("pref.jsonl").startswith("pref.jsonl: no such file; did you mean `prefs.jsonl`?")


def test_a_link_to_nowhere(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "nowhere")
    assert refused("rows.jsonl").startswith("rows.jsonl: no such file")


def test_empty(refused: Any) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"):
        assert refused(name, b"") == text(
            f"{name}: the file is empty", NO_ROWS, "fix: give a file with rows"
        )


def test_blank_lines_only(refused: Any) -> None:
    words = "the file has only blank lines"
    for name, content in (
        ("rows.jsonl", b"\n  \n\t\r\n"),
        ("rows.json", b"  \n\n"),
        ("rows.jsonl.gz", gzip.compress(b"\n\n")),
    ):
        assert refused(name, content) == text(
            f"{name}: {words}", NO_ROWS, "fix: give a file with rows"
        )


def test_last_line_cut(refused: Any) -> None:
    assert refused("rows.jsonl", ROW + ROW + ROW[:-8]) == text(
        "rows.jsonl:3: the last line is cut (Unterminated string starting at, column 17)",
        PART,
        AGAIN,
    )


def test_a_line_in_the_middle_that_is_not_json(refused: Any) -> None:
    assert refused("rows.jsonl", ROW + b'{"prompt": "a"\n' + ROW) == text(
        "rows.jsonl:2: not valid JSON (Expecting ',' delimiter, column 15)",
        "why: rows are never dropped silently",
        "fix: fix the line; each is one JSON object",
    )
    assert refused("rows.jsonl", ROW.strip() + ROW).startswith(
        "rows.jsonl:1: not valid JSON (Extra data, column 33)"
    )


def test_bytes_that_are_not_utf8(refused: Any) -> None:
    wrong = ROW.replace(b"b", b"\xe9")
    fix = text("why: in another encoding the texts would differ", "fix: convert the file to UTF-8")
    assert refused("rows.jsonl", ROW + wrong) == text(
        f"rows.jsonl:2: not UTF-8: byte 0xe9 at offset {len(ROW) + ROW.index(b'b')}", fix
    )
    assert refused("rows.json", b'[{"a": "\xe9"}]') == text(
        "rows.json: not UTF-8: byte 0xe9 at offset 8", fix
    )
    # The offset is that of the text, not of the compressed bytes.
    assert refused("rows.jsonl.gz", gzip.compress(ROW + wrong)) == text(
        f"rows.jsonl.gz:2: not UTF-8: byte 0xe9 at offset {len(ROW) + ROW.index(b'b')}", fix
    )


def test_utf16(refused: Any) -> None:
    assert "not UTF-8: byte 0xff at offset 0" in refused(
        "rows.jsonl", ROW.decode().encode("utf-16")
    )


def test_a_parquet_column_that_is_not_utf8(refused: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    offsets = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    parquet.write_table(pa.table({"prompt": ["a"], "response": column}), tmp_path / "rows.parquet")
    assert refused("rows.parquet") == text(
        "rows.parquet: the column 'response' holds invalid text "
        "(In chunk 0: Invalid: Invalid UTF8 sequence at string index 0)",
        "why: tokenizers need valid UTF-8",
        "fix: write the file again, with its texts in UTF-8",
    )


def test_lone_surrogates(refused: Any) -> None:
    half = b'{"prompt": "a", "response": ["\\ud83d"]}\n'
    assert refused("rows.jsonl", ROW + half) == text(
        "rows.jsonl:2: a text holds a lone surrogate (\\ud800 to \\udfff)",
        "why: it is not a valid character, and tokenizers refuse it",
        "fix: write the pair whole, or the character itself",
    )
    assert "a lone surrogate" in refused("rows.jsonl", b'{"\\uDE42": 1}\n')


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_nan_literals(refused: Any, literal: str) -> None:
    row = b'{"prompt": "a", "response": "b", "reward": %s}\n' % literal.encode()
    assert refused("rows.jsonl", ROW + row) == text(
        f"rows.jsonl:2: {literal} is not a JSON number",
        "why: rewards and losses must be finite",
        "fix: write null where there is no number",
    )


def test_a_key_twice_in_a_row(refused: Any) -> None:
    assert refused(
        "rows.jsonl", ROW + b'{"prompt": "a", "response": "b", "prompt": "c"}\n'
    ) == text(
        "rows.jsonl:2: the key 'prompt' is given twice in one object",
        "why: only the last would be read",
        "fix: keep one of them",
    )
    nested = b'{"messages": [{"role": "user", "content": "a", "role": "user"}]}\n'
    assert "rows.jsonl:1: the key 'role' is given twice" in refused("rows.jsonl", nested)


def test_a_column_twice_in_parquet(refused: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert refused("rows.parquet") == text(
        "rows.parquet: the column 'text' is there twice",
        "why: only the last would be read",
        "fix: write the file again with one of them",
    )


def test_gzip_or_parquet_under_a_wrong_name(refused: Any) -> None:
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
        assert refused(name, content) == text(
            f"{name}: the name ends with {ending} but the content is {found}",
            BY_NAME,
            "fix: rename the file to what it is",
        )


def test_gzip_cut_or_damaged(refused: Any) -> None:
    packed = gzip.compress(ROW * 100, mtime=0)
    assert refused("rows.jsonl.gz", packed[:-9]) == text(
        "rows.jsonl.gz: the gzip file is cut or damaged "
        "(Compressed file ended before the end-of-stream marker was reached)",
        PART,
        AGAIN,
    )
    flipped = packed[:-8] + bytes(4) + packed[-4:]
    assert "cut or damaged (CRC check failed" in refused("rows.jsonl.gz", flipped)


def test_parquet_cut_or_damaged(refused: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [str(i) * 500 for i in range(500)]}), path)
    whole = path.read_bytes()
    assert refused("rows.parquet", whole[: len(whole) // 2]) == text(
        "rows.parquet: the parquet file is cut: its end is missing", PART, AGAIN
    )
    half = len(whole) // 2
    zeroed = whole[:half] + bytes(2000) + whole[half + 2000 :]
    message = refused("rows.parquet", zeroed)
    assert message.startswith("rows.parquet: the parquet file is damaged (")
    assert message.endswith(text("", PART, AGAIN))


def test_shards_that_disagree_on_columns(refused: Any, tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([{"text": "a"}] * 4)
    one.save_to_disk(str(tmp_path / "data"), num_shards=2)
    other = datasets.Dataset.from_list([{"text": "a", "extra": "b"}] * 2)
    other.save_to_disk(str(tmp_path / "other"))
    shard = "data-00001-of-00002.arrow"
    shutil.copy(tmp_path / "other" / "data-00000-of-00001.arrow", tmp_path / "data" / shard)
    assert refused("data") == text(
        f"data: the shards disagree on columns: data-00000-of-00002.arrow has text; {shard} has "
        "text, extra",
        "why: a part of the rows would lack what the others have",
        "fix: save the data set again, with the same columns in every shard",
    )


def test_a_shard_that_is_cut_or_missing(refused: Any, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}] * 4).save_to_disk(
        str(tmp_path / "data"), num_shards=2
    )
    shard = tmp_path / "data" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:50])
    message = refused("data")
    assert message == text(
        f"data: the saved data set is damaged ({reason(message)})",
        PART,
        "fix: save the data set again",
    )
    shard.unlink()
    assert "data: the saved data set is damaged ([Errno 2] No such file" in refused("data")


def test_a_line_over_the_limit(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 40)
    assert refused("rows.jsonl", ROW + ROW.replace(b"b", b"b" * 50)) == text(
        "rows.jsonl:2: the line is longer than 40 bytes",
        "why: so long a line is more likely a file without line breaks than a row",
        "fix: one row a line; a file that is one JSON list has the name .json",
    )


def test_a_number_of_thousands_of_digits(refused: Any) -> None:
    row = b'{"text": "a", "id": %s}\n' % (b"1" * 5000)
    assert refused("rows.jsonl", row) == text(
        "rows.jsonl:1: a whole number of thousands of digits",
        "why: no reward or rating needs so many",
        "fix: write it as text",
    )


def test_nested_too_deeply(refused: Any) -> None:
    assert refused("rows.jsonl", b"[" * 100_000 + b"\n") == text(
        "rows.jsonl:1: nested too deeply",
        "why: JSON readers limit the depth, and rows do not need it",
        "fix: fix the line",
    )


def test_lines_that_are_no_objects(refused: Any) -> None:
    for line, kind in (
        (b"[1]", "a list"),
        (b'"a"', "a text"),
        (b"1", "a number"),
        (b"null", "null"),
    ):
        assert refused("rows.jsonl", ROW + line + b"\n") == text(
            f"rows.jsonl:2: the row is {kind}, not an object",
            "why: without names nothing says which value is the prompt",
            'fix: name the columns: {"prompt": ..., "response": ...}',
        )


def test_json_that_is_no_list(refused: Any) -> None:
    assert refused("rows.json", ROW) == text(
        "rows.json: the file is an object, not a list of objects",
        LISTED,
        "fix: rename it to .jsonl if every line is an object, else wrap the rows in [ ]",
    )
    assert refused("rows.json", b"3") == text(
        "rows.json: the file holds a number, not a list of objects",
        LISTED,
        "fix: wrap the rows in [ ]",
    )
    assert refused("rows.json", b"[]") == text(
        "rows.json: the data set has no rows", NO_ROWS, "fix: give one with rows"
    )


def test_places_in_a_json_list(refused: Any) -> None:
    assert refused("rows.json", b'[{"a": 1}, 2]').startswith(
        "rows.json, item 1: the row is a number"
    )
    assert refused("rows.json", b'[{"a": 1},\n {"a": ').startswith(
        "rows.json:2: the last line is cut"
    )


def test_other_kinds_of_files(refused: Any) -> None:
    assert refused("rows.tsv", b"a\tb\n") == text(
        "rows.tsv: unknown kind of file '.tsv'",
        BY_NAME,
        "fix: one of .jsonl, .json, .jsonl.gz, .parquet, .csv",
    )


def test_unreadable(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "rows.jsonl").write_bytes(ROW)
    monkeypatch.setattr(Path, "open", no)
    assert refused("rows.jsonl") == text(
        "rows.jsonl: cannot be read (Permission denied)",
        NO_ROWS,
        "fix: give its reader the right to read it",
    )


def test_a_directory_that_is_no_data_set(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert refused("rows.jsonl") == text(
        "rows.jsonl: this is a directory, and not a data set saved with `save_to_disk`",
        "why: which of its files hold the rows cannot be guessed",
        "fix: give a file (.jsonl, .json, .jsonl.gz, .parquet, .csv) or save the data set there",
    )


# ---------------------------------------------------------------- what must work


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
    """Spaces and Unicode in them; relative to the recipe, up and down."""
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
