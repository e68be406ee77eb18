"""Every shipped recipe loads, resolves, and is the chain that its comment describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES
from rpo_trainer.recipe import (
    DPOStage,
    RewardStage,
    RPOStage,
    dump_resolved,
    expand_stages,
    load_recipe,
)

RECIPES = Path(__file__).parents[2] / "recipes"
# The files in accelerate/ are configurations of launchers.
SHIPPED = sorted(p for p in RECIPES.rglob("*.yaml") if p.parent.name != "accelerate")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_shipped_recipe_loads_and_resolves(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_resolved(recipe), encoding="utf-8")
    assert expand_stages(load_recipe(copy).recipe) == expand_stages(recipe)


@pytest.mark.parametrize("kind", ["sft", "dpo", "rpo"])
def test_there_is_a_recipe_for_each_kind_of_stage(kind: str) -> None:
    stages = load_recipe(RECIPES / f"{kind}.yaml").recipe.stages
    assert [stage.kind for stage in stages] == [kind]


def test_the_papers_chain() -> None:
    stages = expand_stages(load_recipe(RECIPES / "nemotron4" / "chain.yaml").recipe)
    names = ["code-sft", "general-sft", "dpo", "rpo-1", "rpo-2", "rpo-3"]
    assert [stage.name for stage in stages] == names
    assert [stage.global_batch_size for stage in stages[:3]] == [128, 128, 256]
    assert [stage.num_train_epochs for stage in stages[:3]] == [1, 3, 1]
    assert [stage.learning_rate for stage in stages] == [3e-7, 3e-7, 1e-7, 3e-7, 3e-7, 3e-7]
    replay = stages[1].data.replay
    assert replay is not None
    assert (replay.stage, replay.fraction, replay.of) == ("code-sft", 0.02, "mix")
    dpo, rpo = stages[2], stages[3]
    assert isinstance(dpo, DPOStage)
    assert 3e-4 <= dpo.beta <= 3e-3
    assert 1e-5 <= dpo.sft_loss_weight <= 1e-3
    assert isinstance(rpo, RPOStage)
    assert (rpo.loss_type, rpo.reward_scale, rpo.sft_loss_weight) == ("rpo_bwd_kl", 1.0, 1e-5)
    assert 1e-3 <= rpo.beta <= 1
    assert rpo.reference == "dpo"


def test_the_reward_model_of_helpsteer2() -> None:
    (stage,) = expand_stages(load_recipe(RECIPES / "reward" / "helpsteer2.yaml").recipe)
    assert isinstance(stage, RewardStage)
    assert (stage.objective, stage.rating_range) == ("regression", [0, 4])
    assert tuple(stage.attributes or ()) == HELPSTEER_ATTRIBUTES
    assert stage.reward_weights == "nemotron-4-340b-reward"
    assert (stage.num_train_epochs, stage.global_batch_size) == (2, 128)
    assert (stage.lr_scheduler_type, stage.warmup_steps) == ("constant", 0)
