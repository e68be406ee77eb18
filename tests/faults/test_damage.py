"""Files damaged one by one: detected, and the weights equal those of the undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpo_trainer.errors import RunError
from rpo_trainer.runtime import files
from rpo_trainer.trainers import checkpoint, manifest
from tests.chain import tiny
from tests.conftest import Injected
from tests.faults.conftest import sampled_rpo
from tests.raising import raises

SEED = 20261121
PAGE = 4096


def flipped_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zeroed_page(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(0, len(content), PAGE)
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


HARMS = [flipped_bit, zeroed_page, cut, missing]
Harm = Callable[[Path, random.Random], None]
harms = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)


def drawn(harm: Harm, name: str) -> random.Random:
    """Damage at the same position each time; the seed is in the summary."""
    return random.Random(f"{SEED} {harm.__name__} {name}")


def kept(path: Path) -> Iterator[bytes]:
    """Yield damaged contents of a file; restore it when the generator continues."""
    content = path.read_bytes()
    yield content
    path.write_bytes(content)


# --- a checkpoint ---


@harms
def test_every_file_of_a_checkpoint(harm: Harm, again: Path, injected: Injected) -> None:
    """Whatever is damaged, the previous checkpoint is used."""
    folder = again / "run" / "rpo"
    files = sorted(path for path in (folder / "checkpoint-2").rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "manifest.json", "rng_state.pth"} <= {
        path.name for path in files
    }
    for path in files:
        back = kept(path)
        before = next(back)
        harm(path, drawn(harm, path.name))
        changed = not path.is_file() or path.read_bytes() != before
        fault = checkpoint.verify_manifest(folder / "checkpoint-2")
        # A changed bit in the manifest's white space or version does not affect the checkpoint.
        harmless = path.name == checkpoint.MANIFEST and harm is flipped_bit
        assert fault is not None or harmless or not changed, path
        found = checkpoint.last_complete(folder)
        assert found is not None and found.name == f"checkpoint-{2 if fault is None else 1}"
        injected(f"{harm.__name__} in checkpoint-2/{path.name}, seed {SEED}", "survived")
        next(back, None)
    assert checkpoint.last_complete(folder) == folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", flipped_bit),
        ("optimizer.pt", zeroed_page),
        ("manifest.json", cut),
        ("rng_state.pth", missing),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_and_the_run_ends_as_if_nothing_had_happened(
    name: str, harm: Harm, again: Path, expected: dict[str, str], injected: Injected,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    harm(again / "run" / "rpo" / "checkpoint-2" / name, drawn(harm, name))
    assert tiny.weights(tiny.run(again, sampled_rpo())) == expected
    assert "checkpoint-2 is damaged" in caplog.text
    injected(f"{harm.__name__} in checkpoint-2/{name}, gone on with", "survived")


def test_all_checkpoints(again: Path, expected: dict[str, str], injected: Injected) -> None:
    for path in (again / "run" / "rpo").glob("checkpoint-*"):
        flipped_bit(path / "model.safetensors", drawn(flipped_bit, path.name))
    assert tiny.weights(tiny.run(again, sampled_rpo())) == expected
    injected("flipped_bit in every checkpoint: the stage begins again", "survived")


# --- an output ---


@harms
def test_every_file_of_an_output(
    harm: Harm, straight: Path, tmp_path: Path, injected: Injected
) -> None:
    """Later stages start from it: the run stops and names the file."""
    folder = shutil.copytree(straight, tmp_path / "again")
    final = folder / "run" / "rpo" / "final"
    for path in sorted(path for path in final.rglob("*") if path.is_file()):
        back = kept(path)
        next(back)
        harm(path, drawn(harm, path.name))
        if checkpoint.verify_manifest(final) is not None:
            with raises("run.damaged-output", RunError, where=str(final)) as error:
                tiny.run(folder, sampled_rpo())
            assert "--run-dir" in str(error.value.fix)
            injected(f"{harm.__name__} in final/{path.name}", "stopped")
        else:
            assert path.name == checkpoint.MANIFEST and harm is flipped_bit
            injected(f"{harm.__name__} in final/{path.name}", "survived")
        next(back, None)
    tiny.run(folder, sampled_rpo())


# --- what a start reads ---


def changed_unseen(path: Path) -> None:
    """Change the content, but neither size nor modification time."""
    before = path.stat()
    flipped_bit(path, drawn(flipped_bit, path.name))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_unchanged_start_reads_no_content(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(straight, tmp_path / "again")
    read: list[str] = []
    own = files.file_digest
    for module in (files, manifest):
        monkeypatch.setattr(module, "file_digest", lambda path: read.append(path.name) or own(path))
    tiny.run(folder, sampled_rpo())
    assert read == []
    tiny.run(folder, sampled_rpo(), verify=True)
    assert {"model.safetensors", "config.json", "README.md"} <= set(read)


def test_a_change_that_keeps_size_and_time_is_found_by_verify(
    straight: Path, tmp_path: Path, injected: Injected
) -> None:
    folder = shutil.copytree(straight, tmp_path / "again")
    final = folder / "run" / "rpo" / "final"
    changed_unseen(final / "model.safetensors")
    tiny.run(folder, sampled_rpo())
    with raises("run.damaged-output", RunError, where=str(final)) as error:
        tiny.run(folder, sampled_rpo(), verify=True)
    assert "model.safetensors" in error.value.what
    injected("flipped_bit in final/model.safetensors, times restored, --verify", "stopped")


def test_verify_reads_the_checkpoints(
    again: Path, expected: dict[str, str], injected: Injected, caplog: pytest.LogCaptureFixture
) -> None:
    changed_unseen(again / "run" / "rpo" / "checkpoint-2" / "model.safetensors")
    assert tiny.weights(tiny.run(again, sampled_rpo(), verify=True)) == expected
    assert "checkpoint-2 is damaged" in caplog.text
    injected("flipped_bit in checkpoint-2/model.safetensors, times restored, --verify", "survived")


# --- cached results ---


@harms
def test_the_reference_cache(
    harm: Harm, again: Path, expected: dict[str, str], injected: Injected
) -> None:
    for path in (again / "run" / "reference-cache").rglob("part-*"):
        harm(path, drawn(harm, "cache"))
    assert tiny.weights(tiny.run(again, sampled_rpo())) == expected
    injected(f"{harm.__name__} in the reference cache", "survived")


@harms
def test_sampled_rows(
    harm: Harm, again: Path, expected: dict[str, str], injected: Injected
) -> None:
    """Computed again if unreadable; rows other than those the stage began with are refused."""
    (path,) = (again / "run" / "rpo").glob("generated-*.jsonl")
    harm(path, drawn(harm, "rows"))
    refusal = None
    try:
        tiny.run(again, sampled_rpo())
    except RunError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code == "run.data-changed"
        assert checkpoint.last_complete(again / "run" / "rpo") is not None
    else:
        assert tiny.weights(again / "run") == expected
    injected(f"{harm.__name__} in the sampled rows", "stopped" if refusal else "survived")


# --- the record of the run ---


@harms
def test_chain_json(harm: Harm, again: Path, expected: dict[str, str], injected: Injected) -> None:
    """It is the only record of what was computed: the run stops, and keeps its checkpoints."""
    path = again / "run" / "chain.json"
    content = path.read_bytes()
    harm(path, drawn(harm, "chain.json"))
    code = "run.unreadable-state" if path.is_file() else "run.not-a-run-directory"
    with raises(code, RunError) as error:
        tiny.run(again, sampled_rpo())
    assert error.value.where and error.value.fix
    assert checkpoint.last_complete(again / "run" / "rpo") is not None
    injected(f"{harm.__name__} in chain.json", "stopped")
    path.write_bytes(content)
    assert tiny.weights(tiny.run(again, sampled_rpo())) == expected


@harms
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", pytest.param("recipe.yaml", marks=pytest.mark.slow)]
)
def test_files_that_only_report(
    name: str, harm: Harm, again: Path, expected: dict[str, str], injected: Injected
) -> None:
    harm(again / "run" / name, drawn(harm, name))
    assert tiny.weights(tiny.run(again, sampled_rpo())) == expected
    tiny.metrics(again / "run")  # every remaining line is readable
    injected(f"{harm.__name__} in {name}", "survived")
