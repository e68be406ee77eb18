"""Checkpoint directories: complete or absent, and distinguished."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rpo_trainer.errors import RunError
from rpo_trainer.runtime import files
from rpo_trainer.trainers import checkpoint
from tests.raising import raises


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """checkpoint-9, -20 and -100, complete."""
    for step in (9, 20, 100):
        staged = tmp_path / "staged"
        (staged / "adapter").mkdir(parents=True)
        (staged / "model.safetensors").write_bytes(bytes(range(256)) * step)
        (staged / "adapter" / "config.json").write_text(f'{{"step": {step}}}')
        checkpoint.commit(staged, tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_committed_folders_are_complete(output):
    assert not (output / "staged").exists()
    assert [path.name for path in checkpoint.checkpoints(output)] == [
        "checkpoint-100", "checkpoint-20", "checkpoint-9",
    ]  # fmt: skip
    for path in checkpoint.checkpoints(output):
        assert checkpoint.verify_manifest(path) is None
        files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
        assert set(files) == {"model.safetensors", "adapter/config.json"}
    assert checkpoint.last_complete(output) == output / "checkpoint-100"


def test_commit_replaces_what_lies_there(output, tmp_path):
    staged = tmp_path / "again"
    staged.mkdir()
    (staged / "only.txt").write_text("new")
    checkpoint.commit(staged, output / "checkpoint-9")
    assert checkpoint.verify_manifest(output / "checkpoint-9") is None
    assert not (output / "checkpoint-9" / "model.safetensors").exists()


def cut(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 5)
    return "model.safetensors has 5 bytes, 25600 were written"


def flip(folder: Path) -> str:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[77] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return "the content of model.safetensors has changed"


def remove(folder: Path) -> str:
    (folder / "adapter" / "config.json").unlink()
    return "adapter/config.json is missing"


def no_manifest(folder: Path) -> str:
    (folder / checkpoint.MANIFEST).unlink()
    return "no manifest.json"


def manifest_of(text: str | bytes):
    def write(folder: Path) -> str:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / checkpoint.MANIFEST).write_bytes(content)
        return "manifest.json cannot be read"

    return write


GARBAGE = [b"\xff\xfe\x00", "", "{", "[]", "null", "{}", '{"files": 3}',
           '{"files": {"a": 1}}', '{"files": {"a": {"size": 1}}}',
           '{"files": {"a": {"size": null, "xxh3_128": ""}}}']  # fmt: skip


@pytest.mark.parametrize("harm", [cut, flip, remove, no_manifest, *map(manifest_of, GARBAGE)])
def test_a_damaged_one_is_passed_over_loudly(harm, output, caplog):
    message = harm(output / "checkpoint-100")
    assert checkpoint.verify_manifest(output / "checkpoint-100").startswith(message)
    assert checkpoint.last_complete(output) == output / "checkpoint-20"
    assert "checkpoint-100 is damaged" in caplog.text


def test_without_a_complete_one_there_is_none(output, tmp_path):
    for path in checkpoint.checkpoints(output):
        no_manifest(path)
    assert checkpoint.last_complete(output) is None
    assert checkpoint.last_complete(tmp_path / "nowhere") is None


def test_a_named_one_must_be_whole(output):
    checkpoint.require_complete(output / "checkpoint-9")
    message = flip(output / "checkpoint-100")
    with raises("run.damaged-checkpoint", RunError) as damaged:
        checkpoint.require_complete(output / "checkpoint-100")
    assert message in damaged.value.what
    # A checkpoint by other software has no manifest, and is used unverified.
    no_manifest(output / "checkpoint-20")
    checkpoint.require_complete(output / "checkpoint-20")
    for absent in (output / "checkpoint-1", output / "checkpoint-9" / checkpoint.MANIFEST):
        with raises("run.no-such-checkpoint", RunError, where=str(absent)):
            checkpoint.require_complete(absent)


def test_a_file_that_cannot_be_read_is_damage(output, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    os.utime(output / "checkpoint-9" / "model.safetensors")
    monkeypatch.setattr(files, "file_digest", fail)
    with raises("run.damaged-checkpoint", RunError) as error:
        checkpoint.require_complete(output / "checkpoint-9")
    assert "Permission denied" in error.value.what


def test_files_added_later_do_no_harm(output):
    (output / "checkpoint-100" / "notes.txt").write_text("mine")
    assert checkpoint.verify_manifest(output / "checkpoint-100") is None


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [(None, None, {9, 20, 100}), (0, None, {9, 20, 100}), (1, None, {100}), (2, None, {20, 100}),
     (1, "checkpoint-9", {9, 100}), (2, "checkpoint-9", {9, 100}), (1, "checkpoint-100", {100}),
     (2, "checkpoint-100", {20, 100}), (3, "checkpoint-9", {9, 20, 100}),
     (2, "checkpoint-7", {20, 100}), (5, None, {9, 20, 100})],
)  # fmt: skip
def test_rotation_keeps_the_newest_and_the_best(limit, keep, left, output):
    (output / "runs").mkdir()
    checkpoint.rotate(output, limit, keep and str(output / keep))
    assert {int(path.name[11:]) for path in checkpoint.checkpoints(output)} == left
    assert (output / "runs").is_dir()
