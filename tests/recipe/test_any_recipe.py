"""A recipe with any value in any place loads or is refused with its line; it never crashes the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from rpo_trainer.errors import Problems
from rpo_trainer.recipe import dump_resolved, load_recipe
from tests.anything import ANYTHING, LIKELY, places, spoiled

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(
    path for path in RECIPES.rglob("*.yaml") if "stages:" in path.read_text(encoding="utf-8")
)
# Values of fields of another kind, or of another stage.
WORDS = st.sampled_from(
    ["init", "previous", "model", "dpo", "rpo", "sft", "auto", "1e-5", 1, 2, 0.5, True, None, {}]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_recipe_with_anything_in_any_place(
    shipped: Path, folder: Path, data: st.DataObject
) -> None:
    recipe: Any = YAML(typ="safe", pure=True).load(shipped.read_text(encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(recipe))))
        value = data.draw(WORDS | LIKELY | ANYTHING)
        recipe = spoiled(recipe, path, value, data.draw(st.integers(0, 5)) == 0)
    file = folder / "recipe.yaml"
    # JSON is YAML, except for the numbers NaN and Infinity.
    text = (
        json.dumps(recipe, indent=1, ensure_ascii=False)
        .replace("NaN", ".nan")
        .replace("Infinity", ".inf")
    )
    file.write_text(text, encoding="utf-8")
    try:
        loaded = load_recipe(file)
    except Problems as found:
        for error in found.problems:
            assert (error.where or "").startswith(str(file)), error
            assert error.fix and error.code != "unset", error
    else:
        file.write_text(dump_resolved(loaded.recipe), encoding="utf-8")
        assert load_recipe(file).recipe.stages
