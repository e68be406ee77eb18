"""The `setup` of a row's tests: the parts that the process of the response gets too.

All of `setup` runs with the tests. It may contain expected values, so the process of the response gets only

- its imports, and
- the definitions that the response's code uses, directly or indirectly: classes, and functions and constants
  that neither the tests nor other parts of `setup` use;

never a definition that contains an assertion.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d]\w*")
_BY_TEXT = {
    "eval",
    "exec",
    "globals",
    "locals",
    "vars",
}  # find names that do not appear in the text


@dataclass(frozen=True)
class Shared:
    """Statements of `setup` for the process of the response, and the classes they define."""

    statements: list[str]
    classes: list[str]


class Setup:
    """The `setup` of a row.

    Args:
        source: its code.
        tests: the row's tests.

    Raises:
        SyntaxError, ValueError: `source` is not valid Python.
    """

    def __init__(self, source: str, tests: Sequence[str]) -> None:
        self.source = source
        self._body = ast.parse(source).body
        self._words = {id(node): _words(ast.unparse(node)) for node in self._body}
        rest = [n for n in self._body if not (_names(n) or _is_import(n)) or _asserts(n)]
        used = _words("\n".join(tests)).union(*(self._words[id(node)] for node in rest))
        # Names that the tests use, directly or indirectly: they may contain expected values.
        while True:
            more = used.union(*(self._words[id(n)] for n in self._body if used & set(_names(n))))
            if more == used:
                break
            used = more
        self._for_response = [
            node
            for node in self._body
            if _names(node)
            and not _asserts(node)
            and (isinstance(node, ast.ClassDef) or not used & {*_names(node)})
            and (isinstance(node, ast.ClassDef) or not used & _BY_TEXT)
        ]

    def shared_with(self, code: str) -> Shared:
        """Return the statements for the process that runs this code."""
        wanted = _words(code) if self._for_response else set()
        chosen: set[int] = set()
        while True:
            new = [n for n in self._for_response if id(n) not in chosen and wanted & {*_names(n)}]
            if not new:
                break
            chosen |= {id(node) for node in new}
            wanted = wanted.union(*(self._words[id(node)] for node in new))
        nodes = [node for node in self._body if _is_import(node) or id(node) in chosen]
        classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
        return Shared([ast.unparse(node) for node in nodes], classes)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a definition defines; [] for other statements."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return names if len(names) == len(targets) else []


def _asserts(node: ast.stmt) -> bool:
    """Whether a definition is itself a test, such as a TestCase."""
    for part in ast.walk(node):
        name = part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "")
        if isinstance(part, ast.Assert) or name.startswith(("assert", "TestCase", "raises")):
            return True
    return False
