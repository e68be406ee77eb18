"""The recipes and launch configurations of the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rpo_trainer.errors import RunError, suggestion

PACKAGE = Path(__file__).parents[1]
_SUFFIXES = (".yaml", ".json")


def folder() -> Path:
    """Return their directory: in an installed package inside it, in a checkout next to it."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> dict[str, str]:
    """Return the name of each, and its description in one sentence."""
    root = folder()
    return {
        path.relative_to(root).as_posix(): _sentence(path)
        for path in sorted(root.rglob("*"))
        if path.suffix in _SUFFIXES
    }


def text_of(name: str) -> str:
    """Return the text of a recipe.

    Raises:
        RunError: there is no recipe of this name.
    """
    names = [known for known in shipped() if name in (known, known.rsplit(".", 1)[0])]
    if not names:
        raise RunError(
            f"unknown recipe {name!r}{suggestion(name, _names())}",
            code="option.unknown-recipe",
            where=str(folder()),
            why="only the recipes of the package can be printed by name",
            fix="list the names with `rpo-trainer recipes`",
        )
    return (folder() / names[0]).read_text(encoding="utf-8")


def _names() -> list[str]:
    return [form for name in shipped() for form in (name, name.rsplit(".", 1)[0])]


def copy_to(target: Path, *, overwrite: bool = False) -> Path:
    """Copy all of them to a directory.

    Args:
        overwrite: replace files of the same names in an existing directory; other files are kept.

    Raises:
        RunError: `target` exists.
    """
    if target.exists() and not (overwrite and target.is_dir()):
        raise RunError(
            "the directory exists" if target.is_dir() else "this is a file, not a directory",
            code="option.path-exists",
            where=str(target),
            why="existing files are not replaced by default",
            fix="name a new directory"
            + (", or replace its recipes with --overwrite" if target.is_dir() else ""),
        )
    shutil.copytree(folder(), target, dirs_exist_ok=overwrite)
    return target


def _sentence(path: Path) -> str:
    """Return the first sentence of the comment at the top; of JSON, a text with its name."""
    if path.suffix == ".json":
        return f"DeepSpeed settings of accelerate/{path.stem}.yaml"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    text = re.split(r"(?<=[a-z)\d])[.;] |: rpo-trainer", " ".join(lines) + " ")[0]
    return text.strip().rstrip(".:")
