"""Contents of the documentation: blocks of code, commands, and recipe fragments in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
# The changelog also names things by their old names.
TOLD = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))

_PROGRAM = r"(?:rpo-trainer|torchrun|accelerate|deepspeed|make|pip|python|bash|\.ci/run|\.)"
_FENCED = r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```$"
_INDENTED = r"(?<=\n\n)(?P<indented>(?: {4}[^\n]*\n)+)"


class Block(NamedTuple):
    """A code block: `kind` is the language of a fence, or `indented`, or `comment` of a recipe."""

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
    """Yield the blocks of a document in order; for a recipe, its leading comment."""
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
    """Return the code spans of the text, each on one line; in tables of foreign names, only our column."""
    text = re.sub(_FENCED, "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if path.name == "coming-from.md":
        text = re.sub(r"^\|[^|]*\|([^|]*)\|.*$", r"\1", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(block: Block) -> list[str]:
    """Return the lines of a block that start a program, with continued lines joined, without comments."""
    if block.kind not in ("indented", "comment", "sh"):
        return []
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.kind == "comment":  # it may follow a sentence
        lines = [re.sub(r"^.*: (?=rpo-trainer )", "", line) for line in lines]
    lines = [re.sub(r"\s+#.*$", "", line.strip()) for line in lines]
    return [line for line in lines if is_command(line)]


def is_command(text: str) -> bool:
    return re.match(rf"{_PROGRAM}(?= |$)", text) is not None
