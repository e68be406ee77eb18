"""The store of prepared data: entries by key, complete or absent, built once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.data.store import DataStore, StoredRows, write_stored_rows


def written(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "file").write_text(text)

    return build


def never(folder: Path) -> None:
    raise AssertionError("built again")


def test_an_entry_is_built_once_and_found_by_its_key(tmp_path: Path) -> None:
    entry = DataStore(tmp_path / "store").entry("k", written("a"), "it")
    assert (entry / "file").read_text() == "a"
    assert DataStore(tmp_path / "store").entry("k", never, "it") == entry
    other = DataStore(tmp_path / "store").entry("other", written("b"), "it")
    assert (other / "file").read_text() == "b" and (entry / "file").read_text() == "a"


@pytest.mark.parametrize("damage", ["truncated", "missing", "no-list", "other-version"])
def test_a_damaged_entry_is_built_again_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DataStore(tmp_path)
    entry = store.entry("k", written("content"), "it")
    if damage == "truncated":
        (entry / "file").write_text("con")
    elif damage == "missing":
        (entry / "file").unlink()
    elif damage == "no-list":
        (entry / "entry.json").write_text("{")
    else:
        content = json.loads((entry / "entry.json").read_text())
        (entry / "entry.json").write_text(json.dumps({**content, "version": [0, 0]}))
    assert store.find("k") is None
    assert any(r.levelno == logging.WARNING for r in caplog.records) == (damage != "other-version")
    assert (store.entry("k", written("new"), "it") / "file").read_text() == "new"


def test_a_failed_build_is_absent_and_what_it_wrote_is_continued(tmp_path: Path) -> None:
    store = DataStore(tmp_path)

    def full(folder: Path) -> None:
        (folder / "first").write_text("1")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.entry("k", full, "it")
    assert store.find("k") is None

    def rest(folder: Path) -> None:
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")

    entry = store.entry("k", rest, "it")
    assert {path.name for path in entry.iterdir()} == {"first", "second", "entry.json"}


def build_and_wait(folder: Path) -> None:
    def build(entry: Path) -> None:
        (entry / "file").write_text("killed")
        (folder / "started").touch()
        time.sleep(60)

    DataStore(folder / "store").entry("k", build, "it")


def build_slowly(folder: Path) -> None:
    def build(entry: Path) -> None:
        with (folder / "builds").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        (entry / "file").write_text("whole")

    assert DataStore(folder / "store").entry("k", build, "it").is_dir()


def test_a_killed_build_is_absent_and_its_lock_is_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_and_wait, args=(tmp_path,))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = DataStore(tmp_path / "store")
    assert store.find("k") is None
    assert (store.entry("k", written("whole"), "it") / "file").read_text() == "whole"


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "x"


@pytest.mark.parametrize("where", ["below-a-file", "read-only"])
def test_a_directory_that_cannot_be_written_is_replaced_with_a_warning(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file" / "store" if where == "below-a-file" else tmp_path
    if where == "below-a-file":
        (tmp_path / "file").write_text("")
    else:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    store = DataStore(folder)
    entry = store.entry("k", written("a"), "it")
    assert not entry.is_relative_to(tmp_path) and store.entry("k", never, "it") == entry
    assert sum(r.levelno == logging.WARNING for r in caplog.records) == 1


def test_entries_that_are_not_used_are_collected(tmp_path: Path) -> None:
    store = DataStore(tmp_path)
    for key in ("old", "used"):
        entry = store.entry(key, written(key), "it")
        os.utime(entry, (1, 1))
    (tmp_path / ".killed.partial").mkdir()
    os.utime(tmp_path / ".killed.partial", (1, 1))
    now = time.time() - 1
    assert store.find("used") is not None
    new = store.entry("new", written("new"), "it")
    store.collect(now)
    assert store.find("old") is None and not (tmp_path / ".killed.partial").exists()
    assert store.find("used") is not None and store.find("new") == new


def test_stored_rows_are_the_same_rows(tmp_path: Path) -> None:
    rows = [{"id": f"{i}", "text": "ü😀\u2028", "reward": 0.1 * i, "none": None, "list": [{"a": i}]}
            for i in range(2500)]  # fmt: skip
    rows[7]["text"] = "\ud800"  # not UTF-8
    write_stored_rows(tmp_path / "rows", rows)
    stored = StoredRows(tmp_path / "rows")
    assert len(stored) == 2500 and list(stored) == rows
    assert stored[2499] == rows[2499] and stored[-1] == rows[-1] and stored[5:8] == rows[5:8]
    write_stored_rows(tmp_path / "none", [])
    assert list(StoredRows(tmp_path / "none")) == []
