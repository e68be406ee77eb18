"""What the documents hold: blocks of code, commands, and pieces of recipes in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
# What has changed is told by its old names too.
TOLD = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))

_PROGRAM = r"(?:rpo-trainer|torchrun|accelerate|deepspeed|make|pip|python|bash|\.ci/run|\.)"
_FENCED = r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```$"
_INDENTED = r"(?<=\n\n)(?P<indented>(?: {4}[^\n]*\n)+)"


class Block(NamedTuple):
    """Code set apart: `kind` is the language of a fence, or `indented`, or `comment` of a recipe."""

    page: str
    kind: str
    text: str


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def code(path: Path) -> Iterator[Block]:
    """The blocks of a document in order; of a recipe the comment at its top."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        comment = re.match(r"(?:#.*\n)*", text)
        assert comment
        yield Block(name_of(path), "comment", re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE))
        return
    for found in re.finditer(rf"{_FENCED}|{_INDENTED}", text, flags=re.DOTALL | re.MULTILINE):
        if found["indented"]:
            plain = re.sub(r"^ {4}", "", found["indented"], flags=re.MULTILINE)
            yield Block(name_of(path), "indented", plain)
        else:
            yield Block(name_of(path), found["language"], found["fenced"])


def spans(path: Path) -> list[str]:
    """What stands between backticks in the text, on one line each; of tables of names our side alone."""
    text = re.sub(_FENCED, "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if path.name == "coming-from.md":
        text = re.sub(r"^\|[^|]*\|([^|]*)\|.*$", r"\1", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(block: Block) -> list[str]:
    """The lines of a block that start a program, continued lines joined, without what is remarked."""
    if block.kind not in ("indented", "comment", "sh"):
        return []
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.kind == "comment":  # it may stand behind a sentence
        lines = [re.sub(r"^.*: (?=rpo-trainer )", "", line) for line in lines]
    lines = [re.sub(r"\s+#.*$", "", line.strip()) for line in lines]
    return [line for line in lines if is_command(line)]


def is_command(text: str) -> bool:
    return re.match(rf"{_PROGRAM}(?= |$)", text) is not None
