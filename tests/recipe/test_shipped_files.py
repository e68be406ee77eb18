"""The recipes that come with the package can be found, read and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.errors import RunError
from rpo_trainer.recipe import load_recipe, shipped
from tests.raising import raises

ROOT = Path(__file__).parents[2]


def test_every_file_is_listed_with_a_sentence() -> None:
    found = shipped.shipped()
    files = {
        p.relative_to(ROOT / "recipes").as_posix()
        for p in (ROOT / "recipes").rglob("*")
        if p.suffix in (".yaml", ".json")
    }
    assert set(found) == files
    for name, sentence in found.items():
        assert 15 < len(sentence) < 240, name
        assert not sentence.endswith((".", ":")), name


def test_the_text_of_one_is_a_recipe_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["recipes", "quickstart/chain"])
    assert end.value.code == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path).recipe.stages
    assert path.read_text() == shipped.text_of("quickstart/chain.yaml")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes"])
    assert "nemotron4/chain.yaml" in capsys.readouterr().out


def test_all_of_them_are_copied_but_over_nothing(tmp_path: Path) -> None:
    copied = shipped.copy_to(tmp_path / "mine")
    assert (copied / "accelerate" / "zero3.yaml").is_file()
    with raises("option.path-exists", RunError) as error:
        shipped.copy_to(tmp_path / "mine")
    assert str(tmp_path / "mine") in str(error.value)


def test_an_unknown_name_is_an_error() -> None:
    with raises("option.unknown-recipe", RunError) as error:
        shipped.text_of("grpo")
    assert "'grpo'" in str(error.value) and "rpo-trainer recipes" in str(error.value)


def test_an_installed_package_has_them_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rpo_trainer"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.folder() == package / "recipes"


def test_the_wheel_takes_them_in() -> None:
    assert '"recipes" = "rpo_trainer/recipes"' in (ROOT / "pyproject.toml").read_text()
