"""`--allow-changed`: a key, or a prefix of keys; anything else is an error that names the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpo_trainer.chain.changes import with_rounds
from rpo_trainer.recipe import Recipe
from tests.chain import tiny
from tests.cli.helpers import call, one_stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allow")
    recipe = one_stage()
    recipe["stages"][0]["training_args"] = {"adam_epsilon": 1e-7}
    path = tiny.write_recipe(folder, recipe)
    assert call("run", path, "--run-dir", folder / "run", "--no-report") == 0
    return path


def resume(recipe: Path, change: str, *keys: str) -> int:
    allowed = [word for key in keys for word in ("--allow-changed", key)]
    words = ["run", recipe, "--run-dir", recipe.parent / "run", "--no-report", change, *allowed]
    return call(*words)


@pytest.mark.parametrize("key", ["stages.code.learning_rate", "stages.code", "stages"])
def test_a_prefix_allows_every_key_below_it(key: str, finished: Path) -> None:
    change = f"stages.code.learning_rate=0.0{len(key)}"
    assert resume(finished, change) == 2
    assert resume(finished, change, key) == 0


def test_a_key_that_was_removed_can_be_allowed(finished: Path) -> None:
    # `training_args` is empty in the new recipe: only the run has the key.
    change, key = "stages.code.training_args={}", "stages.code.training_args.adam_epsilon"
    other = "stages.code.learning_rate"  # changed by the previous test
    assert resume(finished, change, other) == 2
    assert resume(finished, change, other, key) == 0


@pytest.mark.parametrize(
    ("key", "near"),
    [("stages.code.learning_rat", "stages.code.learning_rate"), ("stages.cod", ""), ("stage", "stages"),
     ("stages.code.", ""), ("code", "")],
)  # fmt: skip
def test_what_is_no_key_is_refused(
    key: str, near: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(finished, "seed=3", key) == 2
    shown = capsys.readouterr().err
    assert "[option.unknown-key]" in shown and f"--allow-changed {key}" in shown
    assert f"`{near}`" in shown or not near


def test_a_repeated_stage_stands_for_its_rounds() -> None:
    stages = Recipe.model_validate(tiny.tiny_recipe()).stages
    assert with_rounds(["stages.rpo.beta", "stages.dpo", "seed"], stages) == [
        "stages.rpo-1.beta", "stages.rpo-2.beta", "stages.dpo", "seed",
    ]  # fmt: skip
    assert with_rounds(["stages.rpo", "stages.rpo-2"], stages) == [
        "stages.rpo-1", "stages.rpo-2", "stages.rpo-2",
    ]  # fmt: skip
