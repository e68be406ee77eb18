from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rpo_trainer.recipe import (
    LoadedRecipe,
    PreferenceStage,
    Stage,
    dump_resolved,
    expand_stages,
    load_recipe,
)
from rpo_trainer.recipe.rules import chain
from rpo_trainer.recipe.schema import STAGE_KINDS

Load = Callable[..., LoadedRecipe]


def _links(stages: list[Stage]) -> list[tuple[str, str, str | None]]:
    return [
        (s.name, s.init, s.reference if isinstance(s, PreferenceStage) else None) for s in stages
    ]


def test_each_stage_is_seeded_by_the_one_before_and_that_is_its_reference(
    load: Load, valid: str
) -> None:
    stages = expand_stages(load(valid).recipe)
    assert _links(stages) == [
        ("code-sft", "model", None),
        ("sft", "code-sft", None),
        ("dpo", "sft", "sft"),
        ("rpo-1", "dpo", "dpo"),
        ("rpo-2", "rpo-1", "rpo-1"),
        ("rpo-3", "rpo-2", "rpo-2"),
    ]
    assert all(stage.repeat == 1 for stage in stages)


def test_explicit_init_and_reference(load: Load, valid: str) -> None:
    words = [
        "stages.dpo.init=model",
        "stages.dpo.reference=previous",
        "stages.rpo.init=code-sft",
        "stages.rpo.reference=./elsewhere/model",
    ]
    assert _links(expand_stages(load(valid, words).recipe))[2:5] == [
        ("dpo", "model", "sft"),
        ("rpo-1", "code-sft", "./elsewhere/model"),
        ("rpo-2", "rpo-1", "./elsewhere/model"),
    ]


def test_the_name_of_a_repeated_stage_is_its_last_round(load: Load, valid: str) -> None:
    text = valid.replace("  - name: sft\n", "  - name: sft\n    repeat: 2\n")
    words = ["stages.dpo.init=sft", "stages.dpo.reference=sft-1", "stages.rpo.reference=sft"]
    links = _links(expand_stages(load(text, words).recipe))
    assert links[1:5] == [
        ("sft-1", "code-sft", None),
        ("sft-2", "sft-1", None),
        ("dpo", "sft-2", "sft-1"),
        ("rpo-1", "dpo", "sft-2"),
    ]


def test_replay_of_a_repeated_stage_is_made_concrete(load: Load, valid: str) -> None:
    text = valid.replace("  - name: code-sft\n", "  - name: code-sft\n    repeat: 2\n")
    stages = expand_stages(load(text).recipe)
    assert stages[2].data.replay is not None
    assert stages[2].data.replay.stage == "code-sft-2"


def test_the_resolved_text_is_the_same_recipe_again(load: Load, valid: str, tmp_path: Path) -> None:
    extra = "    report_to: [tensorboard]\n    training_args: {x: null, 'é': 1e-9}\n    beta: 0.1\n"
    text = valid.replace("    beta: 0.1\n", extra) + "seed: 7\nrun_dir: 'no'\n"
    recipe = load(text).recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(recipe), encoding="utf-8")
    again = load_recipe(path).recipe
    assert expand_stages(again) == expand_stages(recipe)
    assert (again.model, again.seed, again.run_dir) == (recipe.model, 7, "no")
    assert dump_resolved(again) == dump_resolved(recipe)


def test_rules_of_the_raw_recipe_know_the_kinds_as_the_stages_do() -> None:
    kinds = STAGE_KINDS.items()
    assert tuple(k for k, one in kinds if one.needs_reference) == chain.PREFERENCE_KINDS
    assert tuple(k for k, one in kinds if not one.trains_reward_model) == chain._POLICIES
    assert tuple(STAGE_KINDS) == chain._KINDS


def test_a_reference_of_its_own_is_another_model_than_the_start(load: Load, valid: str) -> None:
    stages = expand_stages(load(valid, ["stages.rpo.reference=sft"]).recipe)
    assert {s.name: s.own_reference for s in stages} == {
        "code-sft": None, "sft": None, "dpo": None, "rpo-1": "sft", "rpo-2": "sft", "rpo-3": "sft",
    }  # fmt: skip
    assert stages[1].models_read == {"init": "code-sft"}
    assert stages[3].models_read == {"init": "dpo", "reference": "sft"}
