from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.errors import RPOTrainerError
from rpo_trainer.recipe import DPOStage, LoadedRecipe, RPOStage, load_recipe
from tests.raising import raises, with_code

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]


@pytest.mark.parametrize(
    "words",
    [
        ["stages.dpo.beta=5e-3"],
        ["--stages.dpo.beta=0.005"],
        ["--stages.dpo.beta", "0.005"],
        ["stages.2.beta=0.005"],
        ["stages.dpo.beta=7", "stages.dpo.beta=0.005"],
    ],
)
def test_forms_of_an_override(load: Load, valid: str, words: list[str]) -> None:
    stage = load(valid, words).recipe.stages[2]
    assert isinstance(stage, DPOStage)
    assert stage.beta == 0.005


def test_values_are_yaml(load: Load, valid: str) -> None:
    words = [
        "seed=010",
        "defaults.max_length=512",
        "run_dir=a=b",
        "stages.dpo.training_args={x: no}",
    ]
    recipe = load(valid, words).recipe
    assert (recipe.seed, recipe.run_dir) == (10, "a=b")
    assert all(stage.max_length == 512 for stage in recipe.stages)
    assert recipe.stages[2].training_args == {"x": "no"}


def test_a_negative_number_is_a_value(problems: Show, valid: str) -> None:
    (found,) = problems(valid, ["--stages.dpo.beta", "-1"])
    assert (found.code, found.where) == ("recipe.out-of-range", "override stages.dpo.beta=-1")


def test_a_repeated_stage_goes_by_its_own_name(load: Load, problems: Show, valid: str) -> None:
    stage = load(valid, ["stages.rpo.beta=0.5"]).recipe.stages[3]
    assert isinstance(stage, RPOStage)
    assert stage.beta == 0.5
    (found,) = problems(valid, ["stages.rpo-2.beta=0.5"])
    assert found.code == "option.unknown-stage" and "`rpo`" in str(found.fix)


def test_a_stage_name_may_hold_dots(load: Load, valid: str) -> None:
    text = valid.replace("name: dpo", "name: v1.5.dpo")
    assert load(text, ["stages.v1.5.dpo.max_length=9"]).recipe.stages[2].max_length == 9


def test_list_elements_by_index_and_one_past_the_end(load: Load, valid: str) -> None:
    words = ["stages.sft.data.train.0.path=x.jsonl", "stages.sft.data.train.1.path=y.jsonl"]
    sources = load(valid, words).recipe.stages[1].data.train
    assert [source.path for source in sources] == ["x.jsonl", "y.jsonl"]
    sources = load(valid, ["stages.sft.data.train=[{path: a}, {path: b}]"]).recipe.stages[1]
    assert [source.path for source in sources.data.train] == ["a", "b"]
    evals = load(valid, ["stages.sft.data.eval.0.path=e"]).recipe.stages[1].data.eval
    assert [source.path for source in evals] == ["e"]


def test_levels_that_the_file_lacks_are_made(load: Load, valid: str) -> None:
    data = load(valid, ["stages.dpo.data.filter.min_gap=1"]).recipe.stages[2].data
    assert data.filter is not None
    assert data.filter.min_gap == 1


def test_a_mapping_from_the_defaults_is_changed_for_one_stage_only(load: Load, valid: str) -> None:
    text = valid.replace("defaults:\n", "defaults:\n  training_args: {a: 1}\n")
    stages = load(text, ["stages.dpo.training_args.b=2"]).recipe.stages
    assert [stage.training_args for stage in stages[1:3]] == [{"a": 1}, {"a": 1, "b": 2}]


def test_max_steps_takes_the_place_of_epochs(load: Load, problems: Show, valid: str) -> None:
    text = valid.replace("    beta: 0.1\n", "    beta: 0.1\n    num_train_epochs: 2\n")
    stage = load(text, ["stages.dpo.max_steps=5"]).recipe.stages[2]
    assert (stage.num_train_epochs, stage.max_steps) == (None, 5)
    both = ["stages.dpo.max_steps=5", "stages.dpo.num_train_epochs=1"]
    (found,) = problems(text, both)
    assert found.code == "recipe.conflicting-fields" and "`max_steps`" in found.what


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        (["stages.dpo.bta=1"], "recipe.unknown-key", "`beta`?"),
        (["sede=1"], "recipe.unknown-key", "`seed`?"),
        (["beta=1"], "recipe.misplaced-key", "kind dpo"),
        (["stages.dop.beta=1"], "option.unknown-stage", "`dpo`?"),
        (["stages.9.beta=1"], "option.unknown-stage", "`9`"),
        (["stages.dpo.dta.filter.x=1"], "recipe.unknown-key", "`data`?"),
        (["stages.dpo.data.fliter.min_gap=1"], "recipe.unknown-key", "`filter`?"),
        (["stages.dpo.data.train.3.path=x"], "option.invalid-key", "0, or 1"),
        (["seed.x=1"], "recipe.wrong-type", "`seed`"),
        (["stages.dpo.beta"], "option.missing-value", "`=`"),
        (["stages.dpo.beta="], "option.missing-value", "null"),
        (["--stages.dpo.beta"], "option.missing-value", "null"),
        (["--stages.dpo.beta", "--seed=1"], "option.missing-value", "null"),
        (["=3"], "option.invalid-key", "``"),
        (["stages..beta=3"], "option.invalid-key", "`stages..beta`"),
        (["run_dir=[1"], "option.invalid-yaml", "quotes"),
        (["run_dir=@x"], "option.invalid-yaml", "quotes"),
        (["stages.dpo.beta=x"], "recipe.wrong-type", "'x'"),
        (["stages.dpo.init=rpo"], "recipe.later-stage", "`rpo`"),
        (["stages.dpo.rpo_alpha=1"], "recipe.unknown-key", "`sft_loss_weight`"),
    ],
)
def test_a_bad_override_is_named_in_its_error(
    problems: Show, valid: str, words: list[str], code: str, word: str
) -> None:
    (found,) = problems(valid, words)
    assert (found.code, found.where) == (code, f"override {words[0]}")
    assert word in str(found)


def test_an_override_can_fix_the_file(load: Load, valid: str) -> None:
    assert load(valid.replace("beta: 0.1", "beta: '0.1'"), ["stages.dpo.beta=0.1"])


def test_errors_of_the_file_come_first(problems: Show, valid: str) -> None:
    found = problems(valid.replace("beta: 0.01", "beta: 0"), ["seed=x", "oops"])
    places = [str(problem.where).split(" ")[0] for problem in found]
    assert places == ["chain.yaml:22", "override", "override"]


@pytest.mark.parametrize(
    ("words", "code", "fix"),
    [
        (["sft.max_steps=3"], "recipe.unknown-key", "`stages.sft.max_steps=3`"),
        (["--dry-run"], "option.missing-value", "--help"),
        (["stages.sft.data.train.0=x.jsonl"], "recipe.wrong-type", "`path: x.jsonl`"),
        (["stages.sft.data.train=x.jsonl"], "recipe.wrong-type", "`[{path: x.jsonl}]`"),
    ],
    ids=["a stage without `stages`", "an option that does not exist", "a path as a source", "as a list"],
)  # fmt: skip
def test_the_fix_of_a_typical_mistake(
    words: list[str], code: str, fix: str, valid: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(valid)
    with raises(code) as error:
        load_recipe(tmp_path / "r.yaml", words)
    assert fix in str(with_code(error.value, code).fix)
