"""Errors are for people: each says what is wrong and how to fix it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rpo_trainer
from rpo_trainer import errors
from tests.raising import codes_of, with_code

PACKAGE = Path(rpo_trainer.__file__).parent
CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.RPOTrainerError)
} - {"Problems"}  # holds errors, and says nothing itself


def incomplete(source: str) -> Iterator[str]:
    """`line: what is missing` of every error that a source makes, raised there or handed on."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name not in CLASSES:
            continue
        said = {k.arg for k in node.keywords if not _is_nothing(k.value)}
        missing = [part for part in ("fix",) if part not in said]
        if not node.args or _is_nothing(node.args[0]):
            missing.insert(0, "what")
        if missing:
            yield f"{node.lineno}: {name} without {', '.join(missing)}"


def _is_nothing(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def test_every_error_says_what_is_wrong_and_how_to_fix_it() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for fault in incomplete(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("raise DataError('a', why='b', fix='c')", []),
        ("raise DataError(e.what, why=e.why, fix=e.fix) from e", []),
        ("raise DataError('a', where='w', fix='c')", []),
        ("raise errors.RunError('a', why='', fix=None)", ["1: RunError without fix"]),
        ("x = [\n  RecipeError(why='b', fix='c')]", ["2: RecipeError without what"]),
        ("raise ValueError('a')", []),
    ],
)
def test_what_is_missing_is_found(source: str, missing: list[str]) -> None:
    assert list(incomplete(source)) == missing


def test_the_parts_are_shown_in_their_places() -> None:
    error = errors.DataError(
        "it is wrong", code="data.wrong", where="a.jsonl:3", why="it matters", fix="fix it"
    )
    assert str(error) == "a.jsonl:3: it is wrong [data.wrong]\n  why: it matters\n  fix: fix it"
    assert str(error.at("stages.s")).startswith("stages.s: it is wrong [data.wrong]\n")


def test_codes_of_several_errors() -> None:
    one, two = (errors.DataError("x", code=f"data.{name}", why="y", fix="z") for name in "ab")
    found = errors.Problems([one, two])
    assert (found.code, codes_of(found)) == ("data.a", ["data.a", "data.b"])
    assert with_code(found, "data.b") is two
