"""A full disk, missing permissions, a size limit: the run stops with the reason and can be resumed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors import SafetensorError

from rpo_trainer.errors import RunError
from rpo_trainer.runtime import files
from rpo_trainer.trainers import checkpoint
from tests.chain import tiny
from tests.chain.killer import at
from tests.conftest import Injected
from tests.faults.conftest import sampled_rpo
from tests.raising import raises

FULL, RIGHTS = errno.ENOSPC, errno.EACCES
# How the libraries report the system's error.
OF_SAFETENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)
OF_TORCH = RuntimeError(
    "[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file"
)

POINTS = [
    "replace:run/recipe.yaml", "replace:run/chain.json", "replace:rpo/generated-",
    "replace:reference-cache", "file:rpo/.staging/checkpoint-1/model.safetensors",
    "file:rpo/.staging/checkpoint-2/optimizer.pt", "file:rpo/.staging/checkpoint-2/scheduler.pt",
    "replace:rpo/.staging/checkpoint-3/manifest.json", "replace:rpo/checkpoint-2",
    "open:metrics.jsonl", "replace:rpo/gaps.jsonl", "file:rpo/.final/model.safetensors",
    "replace:rpo/.final/manifest.json", "replace:rpo/final", "saved:rpo:running",
]  # fmt: skip


@contextlib.contextmanager
def failing(point: str, error: Exception) -> Iterator[list[str]]:
    """Let the write at `point` fail once; yield a list that is filled then."""
    reached: list[str] = []

    def fail() -> None:
        if not reached:
            reached.append(point)
            raise error

    name, _, where = point.partition(":")
    if name != "open":
        with at(point, fail):
            yield reached
        return
    own = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == where and mode != "r" and "b" not in mode:
            fail()
        return own(self, mode, *args, **kwargs)

    with mock.patch.object(Path, "open", opened):
        yield reached


def stops_and_goes_on(
    folder: Path, point: str, error: Exception, said: str, expected: dict[str, str], **settings: Any
) -> None:
    recipe = sampled_rpo()
    recipe["stages"][0]["training_args"] = settings
    with failing(point, error) as reached, raises("run.file-system", RunError) as raised:
        tiny.run(folder, recipe)
    assert reached == [point]
    assert raised.value.exit_code == 2 and raised.value.what.endswith(f": {said}")
    assert raised.value.where and raised.value.fix
    for path in checkpoint.checkpoints(folder / "run" / "rpo"):
        assert checkpoint.verify_manifest(path) is None  # complete or absent
    assert tiny.weights(tiny.run(folder, sampled_rpo())) == expected
    assert tiny.metric_steps(folder / "run", "rpo") == [(step, False) for step in (1, 2, 3)]


# One write of each kind; the others are slow tests.
FAST = {
    "replace:run/chain.json", "replace:reference-cache", "open:metrics.jsonl",
    "file:rpo/.staging/checkpoint-2/optimizer.pt", "file:rpo/.final/model.safetensors",
}  # fmt: skip
ALL = [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in POINTS]


@pytest.mark.parametrize("point", ALL)
def test_a_full_disk(
    point: str, tmp_path: Path, expected: dict[str, str], injected: Injected
) -> None:
    error = OSError(FULL, os.strerror(FULL), "file")
    stops_and_goes_on(tmp_path, point, error, os.strerror(FULL), expected)
    injected(f"ENOSPC at {point}", "survived")


@pytest.mark.parametrize(
    "point",
    [
        "file:rpo/.staging/checkpoint-2/optimizer.pt",
        pytest.param("file:rpo/.staging/checkpoint-3/model.safetensors", marks=pytest.mark.slow),
        pytest.param("replace:rpo/.staging/checkpoint-3/manifest.json", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_while_a_thread_writes(
    point: str, tmp_path: Path, expected: dict[str, str], injected: Injected
) -> None:
    error = OSError(FULL, os.strerror(FULL), "file")
    stops_and_goes_on(tmp_path, point, error, os.strerror(FULL), expected, async_save=True)
    injected(f"ENOSPC at {point}, async_save", "survived")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_no_rights(
    point: str, tmp_path: Path, expected: dict[str, str], injected: Injected
) -> None:
    error = PermissionError(RIGHTS, os.strerror(RIGHTS), "file")
    stops_and_goes_on(tmp_path, point, error, os.strerror(RIGHTS), expected)
    injected(f"EACCES at {point}", "survived")


@pytest.mark.parametrize(
    ("error", "said"),
    [(OF_SAFETENSORS, os.strerror(FULL)), (OF_TORCH, files.refusal(OF_TORCH))],
    ids=["safetensors", "torch"],
)
def test_what_the_libraries_say_of_it(
    error: Exception, said: str, tmp_path: Path, expected: dict[str, str], injected: Injected
) -> None:
    point = "file:rpo/.staging/checkpoint-2/optimizer.pt"
    stops_and_goes_on(tmp_path, point, error, said, expected)
    injected(f"{type(error).__name__} at {point}", "survived")


def test_a_limit_of_the_kernel_itself(
    tmp_path: Path, expected: dict[str, str], injected: Injected
) -> None:
    """Nothing is simulated: files may not exceed 40 KiB, and the weights are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, hard))
    try:
        with raises("run.file-system", RunError) as error:
            tiny.run(tmp_path, sampled_rpo())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = (os.strerror(errno.EFBIG), files.refusal(OF_TORCH))
    assert any(error.value.what.endswith(f": {said}") for said in told)
    assert checkpoint.checkpoints(tmp_path / "run" / "rpo") == []
    assert tiny.weights(tiny.run(tmp_path, sampled_rpo())) == expected
    injected("EFBIG, of the kernel, at the first checkpoint", "survived")


def test_another_error_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    bug = RuntimeError("the size of tensor a must match the size of tensor b")
    with (
        failing("replace:rpo/checkpoint-1", bug),
        pytest.raises(RuntimeError, match="tensor a") as error,
    ):
        tiny.run(tmp_path, sampled_rpo())
    assert error.value is bug
