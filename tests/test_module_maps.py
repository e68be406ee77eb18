"""The docstring of each part lists all of its modules and what they do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rpo_trainer

PACKAGE = Path(rpo_trainer.__file__).parent
PARTS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def modules(part: Path) -> set[str]:
    files = {path.stem for path in part.glob("*.py")}
    return (files | {path.parent.name for path in part.glob("*/__init__.py")}) - {"__init__"}


@pytest.mark.parametrize("part", PARTS)
def test_the_map_names_every_module_of_the_part(part: str) -> None:
    text = (PACKAGE / part / "__init__.py").read_text(encoding="utf-8")
    shown = set(re.findall(r"\w+", ast.get_docstring(ast.parse(text)) or ""))
    assert sorted(modules(PACKAGE / part) - shown) == []


@pytest.mark.parametrize("part", PARTS)
def test_the_map_names_no_module_that_is_gone(part: str) -> None:
    text = ast.get_docstring(
        ast.parse((PACKAGE / part / "__init__.py").read_text(encoding="utf-8"))
    )
    entries = set(re.findall(r"^ *(\w+)/?  +\S", text or "", re.MULTILINE))
    assert sorted(entries - modules(PACKAGE / part)) == []
