"""Parse YAML 1.2 into plain values with the line of every key; write plain values as YAML.

ruamel composes the nodes. The values are constructed here, because the constructors of ruamel keep neither
the text of a key nor a repeated key, and read more than the core schema (`1_000`, dates).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, ScalarEvent, StreamEndEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

Key: TypeAlias = tuple[str | int, ...]
MAX_DEPTH = 40
_WHY = "a recipe is one YAML document of plain values, without objects or references"

# The core schema of YAML 1.2 (section 10.3.2); the lengths stay within the limits of `int` and `float`.
_CORE_SCHEMA: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"|~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]{1,300}", int),
    (r"0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]{1,300}|[0-9]{1,300}(\.[0-9]{0,300})?)([eE][-+]?[0-9]{1,300})?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


@dataclass
class Document:
    """The values of a YAML text, and the line (from 1) of each key and list element."""

    data: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    repeated: list[tuple[Key, int, int]] = field(
        default_factory=list
    )  # key, its line, line of its first occurrence


class YamlProblem(Exception):
    """A text that is not one document of plain values."""

    def __init__(self, what: str, *, line: int, fix: str, why: str = _WHY) -> None:
        super().__init__(what)
        self.what, self.line, self.fix, self.why = what, line, fix, why


def value_at(data: Any, key: Key) -> Any:
    """Return the value at a key of plain values, or None."""
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def plain_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML 1.2 scalar: null, a boolean, a number or the text itself."""
    for pattern, convert in _CORE_SCHEMA:
        if re.fullmatch(pattern, text):
            return convert(text)
    return text


def dump(values: Any) -> str:
    """Return YAML that `parse` reads: keys in order, no aliases."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 4096
    yaml.representer.ignore_aliases = lambda *_: True
    buffer = io.StringIO()
    yaml.dump(values, buffer)
    return buffer.getvalue()


def parse(text: str) -> Document:
    """Read one document.

    Raises:
        YamlProblem: the text is not YAML, is empty, or has several documents, tags, anchors, merge keys,
            tabs in the indentation, keys that are not text, or more than `MAX_DEPTH` levels.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.lstrip()
        if content and "\t" in line.removesuffix(content):
            why = "YAML does not allow tabs there"
            what, fix = "a tab in the indentation", "indent with spaces"
            raise YamlProblem(what, line=number, fix=fix, why=why)
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _PlainComposer
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = int(mark.line) + 1 if mark else 1
        problem = str(error.problem or error.context)
        if "<document start>" in problem:  # the words of ruamel for text after a complete value
            problem = "text after the end of a value"
        what = f"not valid YAML: {problem}"
        fix = f"check indentation, colons and quotes on line {at} and the lines before it"
        raise YamlProblem(what, line=at, fix=fix) from error
    except YAMLError as error:
        position = getattr(error, "position", 0) or 0
        at = text.count("\n", 0, position) + 1
        raise YamlProblem("a control character", line=at, fix="remove it") from error
    if root is None:
        fix = "write at least `model` and `stages`"
        raise YamlProblem("the file is empty", line=1, fix=fix, why="these fields are required")
    document = Document()
    document.data = _value(root, (), document)
    return document


class _PlainComposer(Composer):
    """The composer of ruamel, with errors for what a recipe must not contain."""

    level = 0

    def compose_document(self) -> Any:
        root = super().compose_document()
        event = self.parser.peek_event()
        if not isinstance(event, StreamEndEvent):
            raise YamlProblem(
                "a second document starts here",
                line=_line(event),
                fix="remove the `---` and one of the documents",
                why="a file contains one recipe",
            )
        return root

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        is_key = isinstance(parent, MappingNode) and index is None
        what = fix = ""
        if event.anchor is not None:
            sign = "*" if isinstance(event, AliasEvent) else "&"
            what = f"anchors and aliases are not allowed: `{sign}{event.anchor}`"
            fix = (
                "repeat the value, or put shared values in `defaults`; quote text that starts with "
            )
            fix += "`&` or `*`"
        elif event.tag is not None:
            what = f"the tag `{str(event.tag).replace('tag:yaml.org,2002:', '!!')}` is not allowed"
            fix = "write a plain value; quote it if it is text"
        elif is_key and not isinstance(event, ScalarEvent):
            what, fix = "a key must be text", "write `key: value`"
        elif is_key and event.value == "<<" and event.style is None:
            what = "`<<` (merge keys) is not part of YAML 1.2"
            fix = "put shared values in `defaults`"
        elif self.level > MAX_DEPTH:
            what, fix = "nested too deeply", f"use at most {MAX_DEPTH} levels"
        if what:
            raise YamlProblem(what, line=_line(event), fix=fix)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _value(node: Any, key: Key, document: Document) -> Any:
    """Return the plain value of a node; add lines and repeated keys below it to `document`."""
    if isinstance(node, ScalarNode):
        return node.value if node.style else plain_scalar(node.value)
    if isinstance(node, SequenceNode):
        document.lines |= {(*key, i): _line(item) for i, item in enumerate(node.value)}
        return [_value(item, (*key, i), document) for i, item in enumerate(node.value)]
    fields: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name, line = name_node.value, _line(name_node)
        here = (*key, name)
        if name in fields:
            document.repeated.append((here, line, document.lines[here]))
            _value(value_node, (*here, ""), document)  # for repeated keys in it
        else:
            document.lines[here] = line
            fields[name] = _value(value_node, here, document)
    return fields


def _line(at: Any) -> int:
    return int(at.start_mark.line) + 1
