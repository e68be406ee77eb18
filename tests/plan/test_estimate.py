"""A plan of an entire chain, and its display."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from rpo_trainer.cli import commands as cli
from rpo_trainer.errors import RecipeError
from rpo_trainer.plan import Plan, plan_recipe
from rpo_trainer.recipe import load_recipe
from tests.chain import tiny
from tests.raising import raises


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("plan"), tiny.tiny_recipe())


@pytest.fixture(scope="module")
def plan(recipe: Path) -> Plan:
    return plan_recipe(load_recipe(recipe), recipe.parent / "run", measure=True)


def test_every_stage_is_planned(plan: Plan) -> None:
    assert [stage.name for stage in plan.stages] == list(tiny.STAGES)
    assert [stage.steps for stage in plan.stages] == [tiny.SFT_STEPS] * 2 + [
        tiny.PREFERENCE_STEPS
    ] * 3


def test_tokens_of_sampled_stages_are_an_upper_bound(plan: Plan) -> None:
    assert [stage.assumed for stage in plan.stages] == [False, False, True, True, True]


def test_the_reference_pass_belongs_to_preference_stages(plan: Plan) -> None:
    assert [stage.memory.reference > 0 for stage in plan.stages] == [False, False, True, True, True]
    assert ["reference cache" in stage.disk for stage in plan.stages] == [
        stage.memory.reference > 0 for stage in plan.stages
    ]


def test_disk_is_what_a_run_writes(plan: Plan) -> None:
    """Output and two checkpoints (one that is being written), each with weights and Adam's two moments."""
    n = plan.parameters
    disk = plan.stages[0].disk
    assert disk["output"] == pytest.approx(4 * n, rel=0.01)
    assert disk["checkpoints"] == disk["saving"] == pytest.approx(12 * n, rel=0.01)
    # All stages keep theirs; one stage at a time writes another checkpoint.
    written = [sum(stage.disk.values()) - stage.disk["saving"] for stage in plan.stages]
    assert plan.disk == sum(written) + disk["saving"]


def test_time_is_measured_on_request(plan: Plan, recipe: Path) -> None:
    assert all(stage.seconds and stage.seconds > 0 for stage in plan.stages)


def test_the_command_shows_it_and_writes_nothing(recipe: Path) -> None:
    run_dir = recipe.parent / "unused"
    done = CliRunner().invoke(
        cli.cli,
        [
            "plan",
            str(recipe),
            "defaults.micro_batch_size=2",
            "--run-dir",
            str(run_dir),
            "--engine",
            "zero3",
            "--devices",
            "4",
        ],
    )
    assert done.exit_code == 0, done.output
    assert not run_dir.exists()
    for text in (*tiny.STAGES, "gathered", "ref pass", "4 devices, zero3", "≤"):
        assert text in done.output
    assert "accelerate launch --config_file recipes/accelerate/zero3.yaml" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_the_command_is_planned_with_what_it_was_given(recipe: Path) -> None:
    words = ["plan", str(recipe), "defaults.micro_batch_size=4", "--engine", "ddp"]
    words += ["--devices", "2"]
    shown = CliRunner().invoke(cli.cli, words).output
    assert "defaults.micro_batch_size=4" in "".join(shown.split()).replace("\\", "")


def test_a_batch_that_the_devices_cannot_share_is_found(recipe: Path) -> None:
    with raises("training.indivisible-batch", RecipeError) as error:
        plan_recipe(load_recipe(recipe), recipe.parent / "run", engine="ddp", devices=3)
    assert error.value.where is not None and "defaults.global_batch_size" in error.value.where
