"""A small valid recipe, and a helper that loads a changed copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rpo_trainer.errors import Problems, RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, load_recipe

VALID = """\
model:
  name_or_path: base
defaults:
  learning_rate: 1e-5
  global_batch_size: 8
stages:
  - name: code-sft
    kind: sft
    data: {train: [{path: code.jsonl}]}
  - name: sft
    kind: sft
    data:
      train: [{path: general.jsonl}]
      replay: {stage: code-sft, fraction: 0.02}
  - name: dpo
    kind: dpo
    beta: 0.1
    data: {train: [{path: pairs.jsonl}]}
  - name: rpo
    kind: rpo
    repeat: 3
    beta: 0.01
    data: {train: [{path: pairs.jsonl}]}
"""


@pytest.fixture
def valid() -> str:
    return VALID


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedRecipe]:
    def _load(text: str | bytes, overrides: Sequence[str] = ()) -> LoadedRecipe:
        path = tmp_path / "chain.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(path, overrides)

    return _load


@pytest.fixture
def problems(
    load: Callable[..., LoadedRecipe], tmp_path: Path
) -> Callable[..., list[RPOTrainerError]]:
    """Return the errors of a bad recipe without the directory in their places; each must be complete."""

    def _problems(text: str | bytes, overrides: Sequence[str] = ()) -> list[RPOTrainerError]:
        with pytest.raises(Problems) as caught:
            load(text, overrides)
        assert caught.value.exit_code == 2
        for problem in caught.value.problems:
            assert problem.where and problem.what and problem.fix, problem
            assert problem.code.startswith(("recipe.", "option.", "template.", "rewards.")), problem
            problem.at(problem.where.replace(f"{tmp_path}/", ""))
        return list(caught.value.problems)

    return _problems
