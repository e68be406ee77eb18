"""Tokenized examples in a directory: equal however they were written, complete or absent."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rpo_trainer.data import Audit, tokenize, tokenize_rows, tokenized_shards
from rpo_trainer.data.rows import RowError, RowProblems
from rpo_trainer.data.tokenize import released
from rpo_trainer.data.tokenize_batch import BatchTokenizer
from rpo_trainer.data.tokenized_shards import open_tokenized
from rpo_trainer.errors import DataError, Problems
from tests.conftest import Injected
from tests.data.test_parallel_map import rows
from tests.raising import raises, with_code

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BATCH", 7)
    monkeypatch.setattr(tokenize, "SHARD", 21)


def written(
    given: Any, tokenizer: Any, folder: Path | None, processes: int = 1, **fields: Any
) -> tuple[Any, Audit]:
    audit = Audit()
    data = tokenize_rows(
        given, tokenizer, kind="sft", max_length=60, truncation="drop", audit=audit, folder=folder,
        processes=processes, **fields,
    )  # fmt: skip
    return data, audit


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that are tokenized from now on."""
    seen: list[str] = []
    plain = BatchTokenizer.__call__

    def observed(self: BatchTokenizer, batch: Any) -> Any:
        seen.extend(row["id"] for row in batch)
        return plain(self, batch)

    monkeypatch.setattr(BatchTokenizer, "__call__", observed)
    return seen


def test_a_directory_has_the_examples_and_counts_of_memory(chatml: Any, tmp_path: Path) -> None:
    memory, counts = written(rows(100), chatml, None)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        data, audit = written(rows(100), chatml, folder, processes)
        assert data.data.table.combine_chunks() == memory.data.table.combine_chunks()
        assert audit.as_dict() == counts.as_dict()
        assert audit.summary_lines() == counts.summary_lines()
        assert vars(audit.special_text["s"]) == vars(counts.special_text["s"])
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert [name for name in files(folder) if name.endswith(".arrow")] == [
        f"shard-0000{number}.arrow" for number in range(5)
    ]


def test_the_examples_are_memory_mapped(chatml: Any, tmp_path: Path) -> None:
    before = pa.total_allocated_bytes()
    data, _ = written(rows(100), chatml, tmp_path)
    again = open_tokenized(tmp_path)
    assert again is not None and pa.total_allocated_bytes() - before < 1000
    assert again.to_list() == data.to_list()
    assert again._fingerprint == data._fingerprint
    assert len(pickle.dumps(again)) < 20_000 + 1000 * len(again.data.blocks)


@pytest.mark.slow
def test_a_killed_process_leaves_shards_that_are_not_tokenized_again(
    chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: Injected
) -> None:
    whole, counts = written(rows(100), chatml, tmp_path / "whole")
    chatml.save_pretrained(tmp_path / "tokenizer")
    program = f"""
import os, signal
from pathlib import Path
from transformers import AutoTokenizer
from rpo_trainer.data import tokenize
from rpo_trainer.data.tokenize_batch import BatchTokenizer
from tests.data.test_parallel_map import rows
from tests.data.test_tokenized_shards import written

tokenize.BATCH, tokenize.SHARD = 7, 21
plain = BatchTokenizer.__call__

def killed(self, batch):
    if batch[0]["id"] == "r49":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch)

BatchTokenizer.__call__ = killed
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
written(rows(100), tokenizer, Path({str(tmp_path / "part")!r}))
"""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    assert subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path).returncode == -9
    part = tmp_path / "part"
    assert len(files(part)) == 4  # two shards with their counts
    assert open_tokenized(part) is None
    seen = counted(monkeypatch)
    resumed, audit = written(rows(100), chatml, part)
    assert seen == [f"r{number}" for number in range(42, 100)]
    assert files(part) == files(tmp_path / "whole")
    assert resumed.to_list() == whole.to_list()
    assert audit.as_dict() == counts.as_dict()
    injected("SIGKILL while examples are tokenized into a directory", "survived")


@pytest.mark.parametrize("damage", ["short", "absent", "counts", "counts absent"])
def test_a_damaged_shard_is_built_again(
    chatml: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    injected: Injected,
    damage: str,
) -> None:
    _, counts = written(rows(100), chatml, tmp_path)
    before = files(tmp_path)
    kind = "json" if damage.startswith("counts") else "arrow"
    path = tmp_path / f"shard-00002.{kind}"
    if damage.endswith("absent"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    caplog.clear()
    assert open_tokenized(tmp_path) is None
    warned = [record.levelno for record in caplog.records]
    assert warned == ([] if damage == "counts absent" else [logging.WARNING])
    seen = counted(monkeypatch)
    _, audit = written(rows(100), chatml, tmp_path)
    assert seen == [f"r{number}" for number in range(42, 63)]
    assert files(tmp_path) == before and audit.as_dict() == counts.as_dict()
    injected(f"a damaged shard of tokenized examples ({damage})", "survived")


def test_an_absent_or_damaged_directory(chatml: Any, tmp_path: Path) -> None:
    assert open_tokenized(tmp_path / "absent") is None
    written(rows(30), chatml, tmp_path)
    (tmp_path / "tokenized.json").write_text("{")
    assert open_tokenized(tmp_path) is None
    (tmp_path / "tokenized.json").unlink()
    (tmp_path / "tokenized.json").mkdir()
    with raises("data.tokenized-files", DataError, where=str(tmp_path)):
        open_tokenized(tmp_path)


@pytest.mark.parametrize("suffix", ["arrow", "json"])
def test_a_full_disk(
    chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: Injected, suffix: str
) -> None:
    plain, number = os.fsync, 0

    def full(file: int) -> None:
        nonlocal number
        number += 1
        if number == (5 if suffix == "arrow" else 6):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file)

    monkeypatch.setattr(os, "fsync", full)
    with raises("data.tokenized-files", DataError, where=str(tmp_path)) as error:
        written(rows(100), chatml, tmp_path)
    assert error.value.why == os.strerror(errno.ENOSPC)
    assert tokenized_shards.read_shard(tmp_path, 1) is not None
    assert tokenized_shards.read_shard(tmp_path, 2) is None
    assert open_tokenized(tmp_path) is None
    assert ("shard-00002.arrow" in files(tmp_path)) == (suffix == "json")
    monkeypatch.setattr(os, "fsync", plain)
    written(rows(100), chatml, tmp_path)
    assert not [name for name in files(tmp_path) if name.startswith(".")]
    injected(f"a full disk while a shard's {suffix} is written", "refused")


def test_faults_of_rows_are_kept_with_a_shard(chatml: Any, tmp_path: Path) -> None:
    given = rows(100)
    for i in (3, 61):
        given[i]["messages"][1]["content"] = chr(0xF0000)
    given[60]["messages"][1]["tool_calls"] = [{"arguments": {}}]
    found = []
    for folder in (None, tmp_path, tmp_path):
        with pytest.raises(Problems) as error:
            written(given, chatml, folder)
        private = with_code(error.value, "data.private-use-characters")
        assert private.details == {"rows": ["r3", "r61"], "of": 100}
        found.append([vars(problem) for problem in error.value.problems])
    assert found[0] == found[1] == found[2]
    assert open_tokenized(tmp_path) is None


def test_no_rows_left_is_not_complete(chatml: Any, tmp_path: Path) -> None:
    empty = [row for row in rows(100) if row["messages"][1]["content"] == ""]
    with raises("data.no-rows-left", DataError):
        written(empty, chatml, tmp_path)
    assert open_tokenized(tmp_path) is None


def test_released_rows_are_read_in_order_and_freed(chatml: Any, tmp_path: Path) -> None:
    given = rows(100)
    expected, _ = written([*given], chatml, None)
    held = []

    def observed() -> Any:
        for row in released(given):
            held.append(len(given))
            yield row

    data, _ = written(observed(), chatml, tmp_path)
    assert data.to_list() == expected.to_list()
    assert held == [*range(99, -1, -1)] and given == []


def test_every_count_survives_json(tmp_path: Path) -> None:
    audit, problems = Audit(), RowProblems()
    audit.keep("s")
    audit.drop("too_long", "r1")
    audit.add_too_long(99)
    audit.warn("special_token_text", "r2")
    audit.add_special_text("s", {"<|a|>", "<|b|>"})
    audit.add_special_text("t", set())
    audit.add_generation("s", "r3", ("x\n", "y"))
    audit.add_truncated("s", [True, False])
    audit.add_lengths(3, [4, 5])
    problems.add(RowError("reason", "data.code"), "r4")
    shard = tokenized_shards.Shard(0, 4, 1, 0, "d", audit, problems)
    content = json.loads(json.dumps(tokenized_shards._to_json(shard)))
    again = tokenized_shards._from_json(content)
    found = []
    for one in (shard, again):
        whole = Audit()
        whole.add_tokenized(one.audit)
        special = {source: vars(text) for source, text in whole.special_text.items()}
        found.append((whole.as_dict(), whole._lengths, special, one.problems._rows))
    assert found[0] == found[1]
