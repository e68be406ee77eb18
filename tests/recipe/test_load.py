from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rpo_trainer.errors import Problems
from rpo_trainer.recipe import LoadedRecipe, RPOStage, load_recipe, resolve_path
from tests.recipe.test_bad_recipes import TEN

Load = Callable[..., LoadedRecipe]
Show = Callable[..., list[str]]


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


def test_a_default_is_checked_beside_the_other_defaults(load: Load, valid: str) -> None:
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
    shown = problems(TEN)
    lines = [int(text.split(":")[1].split(" ")[0]) for text in shown]
    assert lines == [3, 4, 6, 11, 14, 15, 19, 20, 21, 22]


def test_all_are_in_the_text_of_the_exception(load: Load) -> None:
    with pytest.raises(Problems) as caught:
        load(TEN)
    text = str(caught.value)
    assert text.count("chain.yaml:") == len(caught.value.problems) == 10
    assert text.endswith("10 problems found")


def test_yaml_that_cannot_be_read_has_file_and_line(problems: Show) -> None:
    assert problems("model: x\n\tseed: 1\n")[0].startswith("chain.yaml:2: a tab")
    assert "a recipe is a mapping; this file holds a list" in problems("- a\n- b\n")[0]
    assert "single value" in problems("hello\n")[0]
    assert problems("model: !!python/object:os.x {}\n")[0].startswith("chain.yaml:1: the tag")


def test_bad_yaml_and_bad_overrides_are_shown_together(problems: Show) -> None:
    shown = problems("", ["nonsense"])
    assert len(shown) == 2
    assert "there is no `=`" in shown[1]


def test_not_utf8(problems: Show) -> None:
    shown = problems(b"model: x\nrun_dir: caf\xe9\n")
    assert shown[0].startswith("chain.yaml:2: byte 21 of the file is not UTF-8")


def test_too_large(problems: Show) -> None:
    assert "1 MiB" in problems("a: 1\n" * 300_000)[0]


def test_absent_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("x")
    with pytest.raises(Problems, match=r"no such file; did you mean `.*chain\.yaml`\?"):
        load_recipe(tmp_path / "chian.yaml")
    with pytest.raises(Problems, match="no such file\n"):
        load_recipe(tmp_path / "no" / "directory.yaml")


def test_a_directory_names_the_recipes_in_it(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("x")
    with pytest.raises(Problems, match=r"(?s)a directory, not a recipe.*chain\.yaml"):
        load_recipe(tmp_path)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(Problems, match="cannot be read: Permission denied"):
        load_recipe(tmp_path / "chain.yaml")


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
