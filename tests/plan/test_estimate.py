"""A plan of an entire chain, and its display."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rpo_trainer.cli import commands as cli
from rpo_trainer.errors import RecipeError
from rpo_trainer.plan import Plan, StagePlan, plan_recipe
from rpo_trainer.recipe import load_recipe
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.step.order import TokenBudgetSampler
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.loaders import train_sampler
from tests.chain import tiny
from tests.raising import raises


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("plan"), tiny.tiny_recipe())


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.tiny_recipe()
    made["stages"] = made["stages"][:1]
    return tiny.write_recipe(tmp_path_factory.mktemp("plan"), made)


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
    assert not tiny.written(run_dir)
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


def sft_stages(planned: Plan) -> list[StagePlan]:
    return [stage for stage in planned.stages if not stage.assumed]


def test_the_idle_share_is_that_of_the_engine(one_stage: Path, plan: Plan) -> None:
    """ZeRO-3 has a budget by default: the longest example, if micro-batches have one."""
    assert all(stage.idle_share is None for stage in plan.stages)
    found = {}
    for engine, tokens in (("ddp", ""), ("zero3", ""), ("zero3", "=0"), ("ddp", "=40")):
        overrides = ["defaults.micro_batch_size=1"]
        overrides += [f"defaults.micro_batch_tokens{tokens}"] * bool(tokens)
        loaded = load_recipe(one_stage, overrides)
        (stage,) = plan_recipe(loaded, one_stage.parent / "run", engine=engine, devices=4).stages
        found[engine, tokens] = stage
        assert stage.idle_share is not None and 0 < stage.idle_share < 0.5
    longest = found["zero3", ""].micro_batch_tokens
    assert longest is not None and found["ddp", "=40"].micro_batch_tokens == 40
    assert found["ddp", ""].micro_batch_tokens is found["zero3", "=0"].micro_batch_tokens is None
    # The same micro-batches; one waits in each of them, the other once per step.
    assert found["ddp", ""].idle_share < found["zero3", "=0"].idle_share
    # The memory of a micro-batch is that of the longest example in both.
    fixed, budget = (found["zero3", key].memory.activations for key in ("=0", ""))
    assert budget == pytest.approx(fixed, rel=0.01)


def test_the_budget_of_the_plan_is_that_of_training(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["defaults.micro_batch_size=2"])
    planned = plan_recipe(loaded, recipe.parent / "run", engine="fsdp2", devices=4)
    preparer = StagePreparer(loaded)
    for stage, spec in zip(sft_stages(planned), preparer.stages, strict=False):
        config = preparer.settings(spec, recipe.parent / "run")
        examples = Examples(preparer.prepare(spec).train)
        sampler = train_sampler(examples, "shared", config, 2, by_tokens=True, ranks=4, rank=3)
        assert isinstance(sampler, TokenBudgetSampler)
        assert stage.micro_batch_tokens == sampler.budget


def test_the_idle_share_is_shown(one_stage: Path) -> None:
    words = ["plan", str(one_stage), "defaults.micro_batch_size=1", "--engine", "zero3"]
    words += ["--devices", "4"]
    shown = CliRunner().invoke(cli.cli, words)
    assert "idle:" in shown.output and "micro_batch_tokens:" in shown.output
    made = CliRunner().invoke(cli.cli, [*words, "--json"])
    for stage in json.loads(made.stdout)["stages"]:
        assert 0 <= stage["idle_share"] < 1 and stage["micro_batch_tokens"] > 0
