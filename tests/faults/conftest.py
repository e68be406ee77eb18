"""One small run, interrupted and uninterrupted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.chain import tiny
from tests.chain.killer import run_until


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, so that sums do not depend on other load of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampled_rpo() -> tiny.Recipe:
    """One RPO stage on responses that it samples itself, from random weights; three steps, all kept."""
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "rpo")
    stage.update(repeat=1, save_total_limit=9)
    recipe["stages"] = [stage]
    return recipe


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("faults-straight")
    tiny.run(folder, sampled_rpo())
    return folder


@pytest.fixture(scope="session")
def expected(straight: Path) -> dict[str, str]:
    """The hash of its weights."""
    return tiny.weights(straight / "run")


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run, ended after step 2 of 3."""
    folder = tmp_path_factory.mktemp("faults-stopped")
    run_until("step:rpo:2", lambda: tiny.run(folder, sampled_rpo()))
    return folder


@pytest.fixture
def again(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(stopped, tmp_path / "again")
