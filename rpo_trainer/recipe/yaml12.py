"""YAML 1.2 text to plain values, with the line of every key.

The parser is ruamel's; values are made here from its events, because that gives the line of each
key, all keys that stand twice, and a limit on what aliases may expand to, and because nothing but
plain values can come out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
    StreamStartEvent,
)

Key: TypeAlias = tuple[str | int, ...]
MAX_NODES = 50_000  # values in a document, aliases expanded
MAX_DEPTH = 40
_WHY = "a recipe is one document of plain YAML 1.2, which every reader takes alike"

# The core schema of YAML 1.2 (section 10.3.2); the lengths keep `int` and `float` within their own
# limits.
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,300}")
_BASED = re.compile(r"0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,300}|[0-9]{1,300}(\.[0-9]{0,300})?)([eE][-+]?[0-9]{1,300})?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """The values of a text, and the line (from 1) of each key and list element."""

    data: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    repeated: list[tuple[Key, int, int]] = field(default_factory=list)  # key, its line, the first's


class YamlProblem(Exception):
    """Text that gives no values at all."""

    def __init__(self, what: str, *, line: int, fix: str, why: str = _WHY) -> None:
        super().__init__(what)
        self.what, self.line, self.fix, self.why = what, line, fix, why


def plain_scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar: null, a boolean, a number or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def parse(text: str) -> Document:
    """Read one document.

    Raises:
        YamlProblem: the text is not YAML, is empty, or holds what a recipe must not (several
            documents, tags,
            tabs, keys that are not text, aliases that expand too far).
    """
    _refuse_tabs(text)
    builder = _Builder(YAML(typ="safe", pure=True).parse(text))
    try:
        return builder.document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise YamlProblem(
            f"not valid YAML: {error.problem or error.context}",
            line=line,
            fix=f"look at indentation, colons and quotes on line {line} and just above",
        ) from error
    except YAMLError as error:
        position = getattr(error, "position", 0) or 0
        raise YamlProblem(
            "a control character stands in the text",
            line=text.count("\n", 0, position) + 1,
            fix="remove it; a recipe is plain text",
        ) from error


def _refuse_tabs(text: str) -> None:
    """A tab in the indentation is read differently by different parsers; nobody needs one."""
    for number, line in enumerate(text.split("\n"), start=1):
        if "\t" in line[: len(line) - len(line.lstrip())] and line.strip():
            raise YamlProblem(
                "a tab in the indentation",
                line=number,
                fix="indent with spaces",
                why="YAML allows none: how deep a tab is depends on who reads it",
            )


class _Builder:
    """Values out of parser events, depth first."""

    def __init__(self, events: Iterator[Event]) -> None:
        self.events = events
        self.result = Document()
        self.nodes = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # value and number of nodes in it
        self.open: set[str] = set()  # anchors whose value is not complete

    def document(self) -> Document:
        event = next(self.events)
        while isinstance(event, (StreamStartEvent, DocumentStartEvent)):
            event = next(self.events)
        if isinstance(event, StreamEndEvent):
            raise YamlProblem(
                "the file is empty",
                line=1,
                fix="write at least `model` and `stages`",
                why="there is nothing to run",
            )
        self.result.data = self.value(event, ())
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                raise YamlProblem(
                    "a second document begins here",
                    line=_line(event),
                    fix="keep one document: remove the `---` and what does not belong",
                    why="one file is one chain; which of the two is meant cannot be guessed",
                )
        return self.result

    def value(self, event: Event, key: Key) -> Any:
        self.count(1, event)
        if len(key) > MAX_DEPTH:
            raise YamlProblem(
                "nested too deeply", line=_line(event), fix="a recipe is never so deep"
            )
        if isinstance(event, AliasEvent):
            return self.alias(event)
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if tag is not None:
            raise YamlProblem(
                f"the tag `{_short_tag(str(tag))}` is not allowed",
                line=_line(event),
                fix="write a plain value; quotes make text of anything",
                why="a tag can make any object of a value, and run code to do it",
            )
        before = self.nodes
        if anchor:
            self.open.add(anchor)
        value = self.untagged(event, key)
        if anchor:
            self.open.discard(anchor)
            self.anchors[anchor] = (value, self.nodes - before)
        return value

    def untagged(self, event: Event, key: Key) -> Any:
        if isinstance(event, ScalarEvent):
            return plain_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, MappingStartEvent):
            return self.mapping(key)
        items: list[Any] = []
        for item in self.events:
            if isinstance(item, SequenceEndEvent):
                break
            self.result.lines[(*key, len(items))] = _line(item)
            items.append(self.value(item, (*key, len(items))))
        return items

    def mapping(self, key: Key) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            name = self.name(event)
            here = (*key, name)
            if name in fields:
                self.result.repeated.append((here, _line(event), self.result.lines[here]))
                self.value(next(self.events), (*here, ""))  # read past it
                continue
            self.result.lines[here] = _line(event)
            fields[name] = self.value(next(self.events), here)
        return fields

    def name(self, event: Event) -> str:
        self.count(1, event)
        plain = isinstance(event, ScalarEvent) and event.implicit[0]
        if not isinstance(event, ScalarEvent) or event.tag is not None:
            raise YamlProblem("a key must be a word", line=_line(event), fix="write `word: value`")
        if event.value == "<<" and plain:
            raise YamlProblem(
                "`<<` (merge keys) is not part of YAML 1.2",
                line=_line(event),
                fix="put what stages share in `defaults`",
            )
        return str(event.value)

    def alias(self, event: AliasEvent) -> Any:
        if event.anchor in self.open:
            raise YamlProblem(
                f"`*{event.anchor}` stands inside the value it names",
                line=_line(event),
                fix="write the value out",
            )
        if event.anchor not in self.anchors:
            raise YamlProblem(
                f"`*{event.anchor}` names nothing above it",
                line=_line(event),
                fix=f"write `&{event.anchor}` at the value that is meant, or quote a text with a "
                f"star",
            )
        value, nodes = self.anchors[event.anchor]
        self.count(nodes, event)
        return copy.deepcopy(value)  # an override may change one of the copies

    def count(self, nodes: int, event: Event) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise YamlProblem(
                f"more than {MAX_NODES:,} values, aliases counted as what they stand for",
                line=_line(event),
                fix="use fewer aliases; data belongs in files that the recipe names",
                why="aliases of aliases make a few lines larger than any memory",
            )


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
