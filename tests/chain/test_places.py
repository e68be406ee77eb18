"""`check`, `preview` and `plan` say the same of the same fault: what, and where in the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.plan import plan_recipe
from rpo_trainer.preview import preview
from rpo_trainer.recipe import LoadedRecipe
from tests.chain import tiny

MESSAGES = {"prompt": [{"role": "user", "content": "add 1 and 2"}], "ground_truth": "3"}
REFUSES = "{{ raise_exception('no turns here') if messages[0].content == 'add 1 and 2' else 'x' }}"
SAMPLED = {"prompt": "p", "responses": ["a", "b"], "sampling": {}}


def faults(folder: Path, loaded: LoadedRecipe) -> dict[str, str]:
    """What each command says first."""
    found = {}
    for name, command in {
        "check": lambda: check_recipe(loaded, folder / "run"),
        "preview": lambda: list(preview(loaded, 1)),
        "plan": lambda: plan_recipe(loaded, folder / "run"),
    }.items():
        with pytest.raises(RPOTrainerError) as error:
            command()
        found[name] = str(getattr(error.value, "problems", [error.value])[0])
    return found


@pytest.mark.parametrize(
    ("stage", "rows", "place", "what"),
    [
        ("dpo", [MESSAGES], "stages.dpo.data", "row rows.jsonl:1: "),
        ("code", [{"text": 1}], "stages.code.data", "`text` is"),
        ("code", None, "stages.code.data", "no such file"),
        ("dpo", [SAMPLED], "stages.dpo.data", "sampled, and have no rewards"),
    ],
)
def test_a_fault_of_the_data(
    stage: str, rows: list[dict[str, object]] | None, place: str, what: str, tmp_path: Path
) -> None:
    recipe = tiny.tiny_recipe()
    (tmp_path / "t.jinja").write_text(REFUSES)
    recipe["model"]["chat_template"] = "t.jinja"
    data = tiny.stage_of(recipe, stage)["data"]
    data["train"] = [{"path": "rows.jsonl"}]
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rows == [SAMPLED]:
        tiny.stage_of(recipe, stage)["data"] = {"train": [{"path": "rows.jsonl"}]}
    recipe["stages"] = [tiny.stage_of(recipe, stage)]
    found = faults(tmp_path, tiny.load(tmp_path, recipe))
    assert found["check"] == found["preview"] == found["plan"]
    assert found["check"].startswith(f"{tmp_path / 'recipe.yaml'}:")
    assert f"({place}): " in found["check"] and what in found["check"]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["model"]["tokenizer"] = "./absent"
    found = faults(tmp_path, tiny.load(tmp_path, recipe))
    assert found["check"] == found["preview"] == found["plan"]
    assert found["check"].startswith(f"{tmp_path / 'recipe.yaml'}:")
