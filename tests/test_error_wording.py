"""Every error has a stable code; the wording of each is in `error_wording.json` and in no other test.

After an intended change of wording: `python -m tests.test_error_wording`, and read the diff.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rpo_trainer
from rpo_trainer.errors import DataError, Problems, RecipeError, RPOTrainerError
from tests.raising import raises

SNAPSHOT = Path(__file__).with_name("error_wording.json")
PACKAGE = Path(rpo_trainer.__file__).parent
CODE = re.compile(r"[a-z]+(-[a-z]+)*\.[a-z0-9]+(-[a-z0-9]+)*")
PARTS = ("what", "why", "fix")


class Site(NamedTuple):
    """A call that creates an error, or passes its parts to a function that does."""

    place: str
    code: ast.expr | None
    wording: dict[str, str]


def calls(package: Path) -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(package).as_posix()}:{node.lineno}", node


def error_classes(package: Path) -> set[str]:
    """Names of RPOTrainerError and of all its subclasses, in any module."""
    bases = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    found = {"RPOTrainerError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found - {"Problems"}


def callee(call: ast.Call) -> str:
    return ast.unparse(call.func).split(".")[-1]


def text_of(node: ast.expr) -> str:
    """A text as in the source, with `{…}` for inserted values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    return f"{{{ast.unparse(node)}}}"


def site(place: str, call: ast.Call) -> Site:
    given = {word.arg: word.value for word in call.keywords if word.arg is not None}
    texts = {part: given[part] for part in PARTS if part in given}
    if "what" not in texts:
        prose = [a for a in call.args if isinstance(a, ast.Constant | ast.JoinedStr)]
        if prose and (isinstance(prose[-1], ast.JoinedStr) or isinstance(prose[-1].value, str)):
            texts["what"] = prose[-1]
    return Site(place, given.get("code"), {name: text_of(node) for name, node in texts.items()})


def written(package: Path = PACKAGE) -> dict[str, list[dict[str, str]]]:
    """Code → the wordings that it is raised with."""
    found: dict[str, list[dict[str, str]]] = {}
    for made in (site(place, call) for place, call in calls(package)):
        if isinstance(made.code, ast.Constant) and isinstance(made.code.value, str):
            wordings = found.setdefault(made.code.value, [])
            ordered = {part: made.wording[part] for part in PARTS if part in made.wording}
            if ordered not in wordings:
                wordings.append(ordered)
    for wordings in found.values():
        wordings.sort(key=json.dumps)
    return dict(sorted(found.items()))


def without_code(package: Path = PACKAGE) -> list[str]:
    classes = error_classes(package)
    return [
        place
        for place, call in calls(package)
        if callee(call) in classes and not any(k.arg in ("code", None) for k in call.keywords)
    ]


def test_every_error_is_made_with_a_code() -> None:
    assert without_code() == []


def test_codes_are_a_part_and_a_name() -> None:
    assert [code for code in written() if not CODE.fullmatch(code)] == []


def test_the_wording_is_that_of_the_snapshot() -> None:
    assert written() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_an_error_without_a_code_and_a_changed_sentence_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class OwnError(errors.DataError): ...\n"
        "OwnError('none')\n"
        "OwnError(f'{n} rows', code='data.few', fix='add rows')\n"
        "note(('data',), 'a text', code='data.noted')\n"
        "OwnError('its code comes from the caller', code=code)\n"
    )
    (tmp_path / "b.py").write_text("class DataError(RPOTrainerError): ...\n")
    assert without_code(tmp_path) == ["a.py:2"]
    assert written(tmp_path) == {
        "data.few": [{"what": "{n} rows", "fix": "add rows"}],
        "data.noted": [{"what": "a text"}],
    }


def test_the_code_is_shown_and_survives_a_new_place_and_a_pickle() -> None:
    import pickle

    error = DataError("too few", code="data.few", where="a", details={"rows": 3}).at("b:2")
    assert str(pickle.loads(pickle.dumps(error))).splitlines() == ["b:2: too few [data.few]"]
    assert pickle.loads(pickle.dumps(error)).details == {"rows": 3}


def test_an_error_cannot_be_made_without_a_code() -> None:
    with pytest.raises(TypeError):
        RecipeError("a sentence")  # type: ignore[call-arg]


def test_raises_looks_at_code_and_fields_of_each_problem() -> None:
    first, second = (RecipeError("x", code=f"recipe.{n}", where=n) for n in ("one", "two"))
    with raises("recipe.two", where="two"):
        raise Problems([first, second])
    for code, fields in (("recipe.three", {}), ("recipe.two", {"where": "one"})):
        with pytest.raises(AssertionError), raises(code, **fields):
            raise Problems([first, second])
    with pytest.raises(RPOTrainerError), raises("recipe.one", DataError):
        raise first


if __name__ == "__main__":
    SNAPSHOT.write_text(
        json.dumps(written(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    sys.stdout.write(f"{SNAPSHOT.name}: {len(written())} codes\n")
