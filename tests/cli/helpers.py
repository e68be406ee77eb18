"""Helpers for tests of the command line: calls in this process, and a recipe that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpo_trainer.cli import commands as cli
from tests.chain import tiny


def call(*words: str | Path) -> int:
    """Return the exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    code = end.value.code
    assert isinstance(code, int)
    return code


def one_stage() -> tiny.Recipe:
    """One SFT stage of two steps on eight rows."""
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0].update(max_steps=2, data={"train": [tiny.task("code", "train", 8)]})
    return recipe
