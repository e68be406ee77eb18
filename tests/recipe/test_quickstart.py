"""The two recipes of the quickstart are one chain: what differs is the reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rpo_trainer.recipe import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
DIFFERS = {
    "dpo": {"data"},  # scored by the reward model
    "rpo": {"data", "beta", "reward_scale"},  # η is fitted to its scores
}


def stages(name: str) -> dict[str, dict[str, Any]]:
    recipe = load_recipe(FOLDER / name).recipe
    return {stage.name: stage.model_dump(exclude={"init", "reference"}) for stage in recipe.stages}


def test_both_recipes_train_with_the_same_settings() -> None:
    chain, reward = stages("chain.yaml"), stages("reward.yaml")
    assert {*reward} - {*chain} == {"reward"}
    for name, stage in chain.items():
        differ = {key for key, value in stage.items() if reward[name][key] != value}
        assert differ == DIFFERS.get(name, set()), name
        own, other = dict(stage["data"]), dict(reward[name]["data"])
        own.pop("score"), other.pop("score")
        assert own == other
