"""`check`, `preview`, `plan` and `run` report the same fault equally, with its place in the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rpo_trainer.chain import run_chain
from rpo_trainer.chain.check import check_recipe
from rpo_trainer.errors import DataError, Problems, RPOTrainerError
from rpo_trainer.plan import plan_recipe
from rpo_trainer.recipe import LoadedRecipe
from rpo_trainer.stages.preview import preview
from tests.chain import tiny
from tests.chain.killer import at, run_until
from tests.raising import raises

MESSAGES = {"prompt": [{"role": "user", "content": "add 1 and 2"}], "ground_truth": "3"}
REFUSES = "{{ raise_exception('no turns here') if messages[0].content == 'add 1 and 2' else 'x' }}"
SAMPLED = {"prompt": "p", "responses": ["a", "b"], "sampling": {}}


def faults(folder: Path, loaded: LoadedRecipe) -> dict[str, str]:
    """The first error line of each command."""
    found = {}
    for name, command in {
        "check": lambda: check_recipe(loaded, folder / "run"),
        "preview": lambda: list(preview(loaded, 1)),
        "plan": lambda: plan_recipe(loaded, folder / "run"),
        "run": lambda: run_chain(loaded, folder / "run"),
    }.items():
        with pytest.raises(RPOTrainerError) as error:
            command()
        found[name] = str(getattr(error.value, "problems", [error.value])[0])
    assert found["check"] == found["preview"] == found["plan"] == found["run"]
    return found


@pytest.mark.parametrize(
    ("stage", "rows", "place", "code"),
    [
        ("dpo", [MESSAGES], "stages.dpo.data", "template.refuses-row"),
        ("code", [{"text": 1}], "stages.code.data", "data.wrong-type"),
        ("code", None, "stages.code.data", "data.no-such-file"),
        ("dpo", [SAMPLED], "stages.dpo.data", "data.unscored-responses"),
    ],
)
def test_a_fault_of_the_data(
    stage: str, rows: list[dict[str, object]] | None, place: str, code: str, tmp_path: Path
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
    assert found["check"].startswith(f"{tmp_path / 'recipe.yaml'}:")
    assert f"({place}): " in found["check"] and f"[{code}]" in found["check"]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["model"]["tokenizer"] = "./absent"
    found = faults(tmp_path, tiny.load(tmp_path, recipe))
    assert found["check"].startswith(f"{tmp_path / 'recipe.yaml'}:")


def test_a_fault_that_only_the_run_can_find(tmp_path: Path) -> None:
    """The rows are deleted between two stages, with what was prepared: the place is still reported."""
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    tiny.stage_of(recipe, "general")["data"] = {"train": [{"path": "rows.jsonl"}]}

    def delete() -> None:
        rows.unlink()
        shutil.rmtree(tmp_path / "run" / ".data")

    with at("begin:general", delete), raises("data.no-such-file", DataError) as error:
        tiny.run(tmp_path, recipe)
    assert "recipe.yaml:" in str(error.value) and "(stages.general.data): " in str(error.value)
    assert "rows.jsonl: " in str(error.value)


def test_a_stage_that_has_not_begun_is_checked_before_the_run_goes_on(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["stages"] = recipe["stages"][:2]
    run_until("step:code:2", lambda: tiny.run(tmp_path, recipe))
    tiny.stage_of(recipe, "general")["data"] = {"train": [{"path": "absent.jsonl"}]}
    with raises("data.no-such-file", Problems) as error:
        tiny.run(tmp_path, recipe)
    assert "(stages.general.data): " in str(error.value) and "absent.jsonl: " in str(error.value)
    assert max(step for step, _ in tiny.metric_steps(tmp_path / "run", "code")) == 2
