"""Runs of one short chain as references: by one process, and with each shipped configuration."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain import tiny
from tests.distributed.chains import launched, recipe
from tests.distributed.launch import accelerate, require


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process, without a launcher."""
    folder = tmp_path_factory.mktemp("one")
    tiny.write_recipe(folder, recipe("none"))
    return launched(shlex.split("python -m rpo_trainer run"), folder)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The undisturbed run of two ranks, started by `accelerate launch` with a shipped configuration."""
    known: dict[str, Path] = {}

    def of(config: str) -> Path:
        require(config)
        if config not in known:
            folder = tmp_path_factory.mktemp(config)
            tiny.write_recipe(folder, recipe("none"))
            known[config] = launched(accelerate(config), folder)
        return known[config]

    return of
