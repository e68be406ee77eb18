"""The tiny chain, run once, for tests that inspect it or damage a copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.chain import tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, so that sums do not depend on other load of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the entire chain, never interrupted. Read-only."""
    return tiny.run(tmp_path_factory.mktemp("straight"))


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run with its recipe, in `tmp_path`, which may be changed."""
    shutil.copytree(finished, tmp_path / "run")
    tiny.write_recipe(tmp_path, tiny.tiny_recipe())
    return tmp_path / "run"


@pytest.fixture(scope="session")
def prefix(finished: Path) -> Callable[[Path, str], Path]:
    """A copy of the run as it was before a stage began, so that tests do not have to train up to it."""

    def make(folder: Path, stage: str) -> Path:
        return tiny.cut_before(finished, folder / "run", stage)

    return make
