"""Manifests: what is hashed by which rank, and what a start reads."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.runtime import files
from rpo_trainer.runtime.ranks import Ranks
from rpo_trainer.trainers import manifest

SIZES = {
    "model-1.safetensors": 50, "model-2.safetensors": 50, "model-3.safetensors": 40,
    "rng_state_0.pth": 1, "rng_state_1.pth": 1, "optimizer_0/__0_0.distcp": 30,
    "optimizer_0/__1_0.distcp": 30, "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": 20,
    "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt": 20, "config.json": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    for number, (name, size) in enumerate(SIZES.items()):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * size)
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is read."""
    names: list[str] = []
    own = files.file_digest

    def digest(path: Path) -> str:
        names.append(path.name)
        return own(path)

    monkeypatch.setattr(files, "file_digest", digest)
    monkeypatch.setattr(manifest, "file_digest", digest)
    return names


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / manifest.MANIFEST).read_text())["files"]
    return found


def shift(folder: Path, seconds: int) -> None:
    """Change the modification times of all files, as a copy does."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != manifest.MANIFEST:
            time = path.stat().st_mtime_ns + seconds * 10**9
            os.utime(path, ns=(time, time))


# --- hashing by all ranks ---


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self.local = threading.local()
        self.meeting = threading.Barrier(count, timeout=60)
        self.values: dict[int, Any] = {}

    def rank(self) -> int:
        return int(self.local.rank)

    def world_size(self) -> int:
        return self.meeting.parties

    def _exchange(self, value: Any) -> dict[int, Any]:
        self.values[self.rank()] = value
        self.meeting.wait()
        found = dict(self.values)
        self.meeting.wait()
        return found

    def on_main(self, do: Callable[[], Any]) -> Any:
        return self._exchange(do() if self.rank() == 0 else None)[0]

    def all_gather_dict(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {k: v for part in self._exchange(values).values() for k, v in part.items()}

    def run(self, do: Callable[[], None]) -> None:
        def one(rank: int) -> None:
            self.local.rank = rank
            do()

        threads = [
            threading.Thread(target=one, args=(n,), daemon=True) for n in range(self.world_size())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)


def test_each_rank_hashes_what_it_wrote_and_an_equal_part_of_the_rest():
    parts = manifest.shares(SIZES, 2)
    assert sorted(name for part in parts for name in part) == sorted(SIZES)
    for rank, part in enumerate(parts):
        of_others = {f"rng_state_{1 - rank}.pth", f"optimizer_0/__{1 - rank}_0.distcp"}
        assert not of_others & set(part)
    assert "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" in parts[1]
    loads = [sum(SIZES[name] for name in part) for part in parts]
    assert sum(loads) == sum(SIZES.values()) and abs(loads[0] - loads[1]) <= 50
    # Shards of one rank: with as many ranks as shards, one each.
    shards = {f"model-{n}-of-8.safetensors": 5 for n in range(8)}
    assert [len(part) for part in manifest.shares(shards, 8)] == [1] * 8
    # A file of a rank that this run does not have.
    assert manifest.shares({"rng_state_7.pth": 1}, 2) == [["rng_state_7.pth"], []]
    assert sorted(manifest.shares(SIZES, 1)[0]) == sorted(SIZES)


def test_the_manifest_of_several_ranks_is_that_of_one(folder, monkeypatch):
    shift(folder, -100)
    manifest.write_manifest(folder)
    expected = {name: entry["xxh3_128"] for name, entry in recorded(folder).items()}
    assert set(expected) == set(SIZES)
    ranks, hashed = Threads(3), []
    monkeypatch.setattr(manifest, "in_threads", lambda read, items: [read(item) for item in items])
    own = manifest.file_digest

    def digest(path: Path) -> str:
        hashed.append((ranks.rank(), path.relative_to(folder).as_posix()))
        return own(path)

    monkeypatch.setattr(manifest, "file_digest", digest)
    ranks.run(lambda: manifest.write_manifest(folder, ranks))
    assert {n: entry["xxh3_128"] for n, entry in recorded(folder).items()} == expected
    by_rank = [sorted(n for rank, n in hashed if rank == r) for r in range(3)]
    assert by_rank == [sorted(part) for part in manifest.shares(SIZES, 3)]


def test_the_main_rank_hashes_what_another_one_does_not_see(folder, monkeypatch):
    ranks, hashed = Threads(2), []
    monkeypatch.setattr(manifest, "in_threads", lambda read, items: [read(item) for item in items])
    own = manifest.file_digest

    def digest(path: Path) -> str:
        if ranks.rank() == 1:
            raise FileNotFoundError(path)
        hashed.append(path.relative_to(folder).as_posix())
        return own(path)

    monkeypatch.setattr(manifest, "file_digest", digest)
    ranks.run(lambda: manifest.write_manifest(folder, ranks))
    assert sorted(hashed) == sorted(SIZES) == sorted(recorded(folder))
    assert manifest.verify_manifest(folder, content=True) is None


# --- verification ---


def test_an_unchanged_directory_is_not_read(folder, read):
    manifest.write_manifest(folder)
    read.clear()
    written = (folder / manifest.MANIFEST).stat().st_mtime_ns
    assert manifest.verify_manifest(folder) is None
    assert read == [] and (folder / manifest.MANIFEST).stat().st_mtime_ns == written


def test_a_renamed_directory_is_not_read(folder, read):
    manifest.write_manifest(folder)
    read.clear()
    os.rename(folder, folder.with_name("moved"))
    assert manifest.verify_manifest(folder.with_name("moved")) is None
    assert read == []


@pytest.mark.parametrize("attempt", range(20))
def test_a_change_right_after_the_manifest_is_found(attempt, tmp_path):
    """The clock of a file system has steps: two writes may have the same time."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    manifest.write_manifest(tmp_path)
    path.write_bytes(b"two")
    assert manifest.verify_manifest(tmp_path) == "the content of weights has changed"


def test_a_copied_directory_is_read_once(folder, read, caplog):
    manifest.write_manifest(folder)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    shift(copy, -50)
    read.clear()
    caplog.set_level(logging.INFO)
    assert manifest.verify_manifest(copy) is None
    assert sorted(read) == sorted(Path(name).name for name in SIZES)
    assert len([r for r in caplog.records if r.levelno == logging.INFO]) == 1
    read.clear()
    caplog.clear()
    assert manifest.verify_manifest(copy) is None
    assert read == [] and not caplog.records


def test_a_file_changed_just_now_gets_no_time(folder, read):
    """A second change might leave the same time."""
    manifest.write_manifest(folder)
    (folder / "config.json").touch()
    for _ in range(2):
        read.clear()
        assert manifest.verify_manifest(folder) is None
        assert read == ["config.json"]


def test_where_times_cannot_be_recorded_the_content_still_counts(folder, monkeypatch, caplog):
    manifest.write_manifest(folder)
    shift(folder, -50)

    def refuse(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(manifest, "atomic_write", refuse)
    caplog.set_level(logging.INFO)
    assert manifest.verify_manifest(folder) is None
    assert "Read-only file system" in caplog.text
    (folder / "config.json").write_bytes(b"xx")
    assert manifest.verify_manifest(folder) == "the content of config.json has changed"


def test_only_reading_the_content_finds_a_change_that_keeps_size_and_time(folder):
    manifest.write_manifest(folder)
    path = folder / "model-1.safetensors"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.verify_manifest(folder) is None
    fault = "the content of model-1.safetensors has changed"
    assert manifest.verify_manifest(folder, content=True) == fault


def test_a_manifest_without_times_is_read_once(folder, read):
    shift(folder, -100)
    manifest.write_manifest(folder)
    old = {
        name: {"size": e["size"], "xxh3_128": e["xxh3_128"]} for name, e in recorded(folder).items()
    }
    (folder / manifest.MANIFEST).write_text(json.dumps({"version": 1, "files": old}, indent=1))
    read.clear()
    assert manifest.verify_manifest(folder) is None
    assert sorted(read) == sorted(Path(name).name for name in SIZES)
    read.clear()
    assert manifest.verify_manifest(folder) is None and read == []
    assert all(entry["mtime_ns"] for entry in recorded(folder).values())


def test_a_file_system_without_times(folder, read, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        manifest.write_manifest(folder)
    assert not any("mtime_ns" in entry for entry in recorded(folder).values())
    read.clear()
    assert manifest.verify_manifest(folder) is None and len(read) == len(SIZES)


def test_a_file_is_added_once(folder):
    manifest.write_manifest(folder)
    (folder / "README.md").write_text("card")
    for _ in range(2):
        manifest.add_to_manifest(folder, "README.md")
        written = (folder / manifest.MANIFEST).read_bytes()
    assert recorded(folder)["README.md"]["size"] == 4
    (folder / "README.md").write_text("other")
    manifest.add_to_manifest(folder, "README.md")
    assert (folder / manifest.MANIFEST).read_bytes() != written
    assert manifest.verify_manifest(folder, content=True) is None
