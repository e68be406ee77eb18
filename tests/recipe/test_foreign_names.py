"""The table of other tools' names matches the schema, and is used wherever a name is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from transformers import TrainingArguments

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe.foreign_names import FOREIGN_LOSSES, FOREIGN_NAMES
from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.recipe.where import places

Show = Callable[..., list[RPOTrainerError]]
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_name_leads_somewhere(name: str) -> None:
    row = FOREIGN_NAMES[name]
    assert any(row)
    assert not row.field or row.field in places()
    assert not (row.field and row.recipe)
    if row.training_args:
        assert name in ARGUMENTS or name in ("warmup_ratio", "activation_checkpointing")


@pytest.mark.parametrize("name", [n for n, row in FOREIGN_NAMES.items() if row.field])
def test_a_recipe_names_the_field_that_is_meant(name: str, problems: Show, valid: str) -> None:
    (found,) = problems(valid.replace("    kind: dpo\n", f"    kind: dpo\n    {name}: 1\n"))
    assert found.code in ("recipe.unknown-key", "recipe.misplaced-key")
    assert f"`{FOREIGN_NAMES[name].field}`" in str(found)


@pytest.mark.parametrize("name", [n for n, row in FOREIGN_NAMES.items() if row.training_args])
def test_training_args_has_no_second_name_of_a_field(name: str, problems: Show, valid: str) -> None:
    new = f"    kind: dpo\n    training_args: {{{name}: 1}}\n"
    (found,) = problems(valid.replace("    kind: dpo\n", new))
    assert found.code == "recipe.misplaced-key"
    assert found.where == f"chain.yaml:17 (stages.dpo.training_args.{name})"
    assert FOREIGN_NAMES[name].training_args in str(found.fix)


def test_losses_of_other_tools_are_losses_here() -> None:
    from rpo_trainer.losses import LOSSES

    for foreign, ours in FOREIGN_LOSSES.items():
        assert ours in LOSSES and foreign not in LOSSES
        assert LOSSES[ours].kind in STAGE_KINDS
