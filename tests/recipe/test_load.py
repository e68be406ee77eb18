from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.errors import Problems, RPOTrainerError
from rpo_trainer.recipe import LoadedRecipe, RPOStage, load_recipe, resolve_path
from tests.raising import problems_of, raises
from tests.recipe.test_bad_recipes import TEN

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[RPOTrainerError]]


def test_a_valid_recipe_with_its_defaults(load: Load, valid: str, tmp_path: Path) -> None:
    loaded = load(valid)
    assert loaded.path == tmp_path / "chain.yaml"
    assert loaded.base_dir == tmp_path
    assert loaded.source_text == valid
    assert [stage.name for stage in loaded.recipe.stages] == ["code-sft", "sft", "dpo", "rpo"]
    assert all(stage.learning_rate == 1e-5 for stage in loaded.recipe.stages)
    assert all(stage.num_train_epochs == 1.0 for stage in loaded.recipe.stages)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(load: Load, valid: str) -> None:
    text = b"\xef\xbb\xbf" + valid.replace("\n", "\r\n").encode()
    assert len(load(text).recipe.stages) == 4


def test_numbers_as_people_write_them(load: Load, valid: str) -> None:
    recipe = load(valid.replace("seed: 0\n", "") + "seed: 010\n").recipe
    assert recipe.seed == 10
    assert recipe.stages[0].learning_rate == 1e-5


def test_a_stage_comes_before_the_defaults_and_null_is_a_value(load: Load, valid: str) -> None:
    text = valid.replace("defaults:\n", "defaults:\n  save_steps: 5\n  max_length: 64\n")
    text = text.replace(
        "  - name: dpo\n", "  - name: dpo\n    save_steps: null\n    max_length: 32\n"
    )
    stages = load(text).recipe.stages
    assert [stage.save_steps for stage in stages] == [5, 5, None, 5]
    assert [stage.max_length for stage in stages] == [64, 64, 32, 64]


def test_a_default_goes_only_to_the_kinds_that_have_it(load: Load, valid: str) -> None:
    stages = load(valid.replace("defaults:\n", "defaults:\n  reward_scale: 2.0\n")).recipe.stages
    assert isinstance(stages[3], RPOStage)
    assert stages[3].reward_scale == 2.0
    assert not hasattr(stages[2], "reward_scale")


def test_a_default_is_checked_next_to_the_other_defaults(load: Load, valid: str) -> None:
    warm = "defaults:\n  warmup_steps: 3\n"
    text = valid.replace("defaults:\n", f"{warm}  lr_scheduler_type: constant_with_warmup\n")
    assert {stage.warmup_steps for stage in load(text).recipe.stages} == {3}
    with pytest.raises(Problems):
        load(valid.replace("defaults:\n", warm))


def test_max_steps_of_a_stage_replaces_epochs_of_the_defaults(load: Load, valid: str) -> None:
    text = valid.replace("defaults:\n", "defaults:\n  num_train_epochs: 3\n")
    text = text.replace("  - name: dpo\n", "  - name: dpo\n    max_steps: 7\n")
    stages = load(text).recipe.stages
    assert [(stage.num_train_epochs, stage.max_steps) for stage in stages] == [
        (3.0, None),
        (3.0, None),
        (None, 7),
        (3.0, None),
    ]


def test_ten_mistakes_are_ten_errors_in_the_order_of_the_file(problems: Show) -> None:
    lines = [str(problem.where).split(":")[1].split(" ")[0] for problem in problems(TEN)]
    assert [int(line) for line in lines] == [3, 4, 6, 11, 14, 15, 19, 20, 21, 22]


def test_all_are_in_the_text_of_the_exception(load: Load) -> None:
    with pytest.raises(Problems) as caught:
        load(TEN)
    text = str(caught.value)
    assert text.count("chain.yaml:") == len(caught.value.problems) == 10
    assert text.splitlines()[-1].startswith("10 ")


@pytest.mark.parametrize(
    ("text", "code", "where", "word"),
    [
        ("model: x\n\tseed: 1\n", "recipe.invalid-yaml", ":2", "tab"),
        ("- a\n- b\n", "recipe.not-a-mapping", ":1", "list"),
        ("hello\n", "recipe.not-a-mapping", ":1", "single"),
        ("model: !!python/object:os.x {}\n", "recipe.invalid-yaml", ":1", "!!python/object:os.x"),
        (b"model: x\nrun_dir: caf\xe9\n", "recipe.not-utf8", ":2", "21"),
        ("a: 1\n" * 300_000, "recipe.too-large", "", "1 MiB"),
    ],
    ids=["tab", "list", "text", "tag", "not UTF-8", "too large"],
)
def test_a_file_that_is_no_recipe(
    problems: Show, text: str | bytes, code: str, where: str, word: str
) -> None:
    (found,) = problems(text)
    assert (found.code, found.where) == (code, f"chain.yaml{where}")
    assert word in found.what


def test_bad_yaml_and_bad_overrides_are_shown_together(problems: Show) -> None:
    found = problems("", ["nonsense"])
    assert [problem.code for problem in found] == ["recipe.invalid-yaml", "option.missing-value"]


def test_absent_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("x")
    path = tmp_path / "chian.yaml"
    with raises("recipe.no-such-file", Problems) as error:
        load_recipe(path)
    (found,) = problems_of(error.value)
    assert found.where == str(path) and f"`{tmp_path / 'chain.yaml'}`" in found.what
    with raises("recipe.no-such-file", Problems) as error:
        load_recipe(tmp_path / "no" / "directory.yaml")
    assert "`" not in problems_of(error.value)[0].what


def test_a_directory_names_the_recipes_in_it(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("x")
    with raises("recipe.not-a-file", Problems) as error:
        load_recipe(tmp_path)
    assert str(tmp_path / "chain.yaml") in str(problems_of(error.value)[0].fix)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with raises("recipe.unreadable-file", Problems) as error:
        load_recipe(tmp_path / "chain.yaml")
    assert "Permission denied" in str(error.value)


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path(tmp_path, "a/b.jsonl") == tmp_path / "a" / "b.jsonl"
    assert resolve_path("elsewhere", tmp_path / "c") == tmp_path / "c"
    assert resolve_path("elsewhere", "~/c") == tmp_path / "c"


def test_loading_does_not_import_torch() -> None:
    code = "import sys, rpo_trainer.recipe; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.strip() == "False"
