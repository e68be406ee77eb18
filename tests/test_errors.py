"""Every error says what is wrong and how to fix it, and fits a terminal."""

from __future__ import annotations

import ast
import io
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
} - {"Problems"}  # a list of errors without its own text


def incomplete(source: str) -> Iterator[str]:
    """Yield `line: what is missing` for every error that a source creates, raised or not."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name not in CLASSES:
            continue
        said = {k.arg for k in node.keywords if not _is_nothing(k.value)}
        empty = {k.arg for k in node.keywords if _is_nothing(k.value)}
        missing = [part for part in ("fix",) if part not in said]
        if not node.args or _is_nothing(node.args[0]):
            missing.insert(0, "what")
        if "why" in empty:  # must be omitted instead
            missing.append("the text of why")
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
        ("raise DataError('a', where='w', why='b')", ["1: DataError without fix"]),
        (
            "raise errors.RunError('a', why='', fix=None)",
            ["1: RunError without fix, the text of why"],
        ),
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


LONG = errors.DataError(
    "the columns instruction_text, accepted_answer and declined_answer match no known format",
    code="data.unknown-format",
    where="/a/long/path/without-a-space/" + 8 * "directory-name/" + "rows.jsonl:12",
    fix="name the columns:\n  columns:\n    prompt: instruction_text\nor write `format: orca`",
)


def test_a_rendered_error_is_wrapped_between_words_and_aligned() -> None:
    lines = errors.render(LONG, 60).splitlines()
    assert lines[0].startswith("error[data.unknown-format]: the columns")
    assert f"   at: {LONG.where}" in lines  # a path is not wrapped, so that it can be clicked
    assert max(len(line) for line in lines if LONG.where not in line) <= 60
    assert lines[-4:] == [
        "  fix: name the columns:",
        "         columns:",
        "           prompt: instruction_text",
        "       or write `format: orca`",
    ]
    assert all(line[:7] in (" " * 7, "  fix: ", "   at: ", "error[d") for line in lines)
    words = " ".join(" ".join(lines).split())
    assert LONG.what in words and not words.endswith("None")


def test_a_terminal_gets_rendered_errors_and_a_pipe_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    assert errors.error_text(LONG, stream) == f"error: {LONG}"
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert errors.error_text(LONG, stream) == errors.render(LONG, 60)


def test_several_rendered_errors_are_set_apart() -> None:
    other = errors.RecipeError("x", code="recipe.wrong", why="y", fix="z")
    text = errors.render(errors.Problems([LONG, other]))
    one, two, last = text.split("\n\n")
    assert (one, two) == (errors.render(LONG), errors.render(other))
    assert two == "error[recipe.wrong]: x\n  why: y\n  fix: z" and last.startswith("2 ")
