"""Private names of other libraries that a package uses: from its source, and from the classes it extends."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "rpo_trainer"
DOCUMENTED = {"_exit", "_replace"}  # of os and of named tuples: public despite their names
_TEXT_METHODS = {"endswith", "startswith", "removesuffix", "removeprefix", "partition", "replace"}


def private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in DOCUMENTED


def own_attributes(trees: Sequence[ast.AST]) -> set[str]:
    """Yield names bound in the bodies of classes, or through `self` and `cls`."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                found |= _bound(part)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _of_self(node):
            found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            text = ast.unparse(node)  # self.__dict__["_name"]
            found.add(text.removeprefix("self.__dict__['").removesuffix("']"))
    return {name for name in found if private(name)}


def _bound(part: ast.stmt) -> set[str]:
    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
        return {part.name}
    targets = part.targets if isinstance(part, ast.Assign) else []
    targets = [part.target] if isinstance(part, ast.AnnAssign) else targets
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    if "__slots__" in names:
        names |= {n.value for n in ast.walk(part) if isinstance(n, ast.Constant)}
    return names


def foreign_in(tree: ast.Module, own: set[str]) -> set[str]:
    """Private names that `tree` imports, reads, passes by keyword or has as strings, and that `own` lacks."""
    imported = set(_imported(tree))
    named = {*imported, *_attributes(tree), *_strings(tree)} - own
    return {name for name in named | imported if private(name) and not name.startswith("_rpo_")}


def read_of_others(tree: ast.Module) -> set[str]:
    """Private attributes of objects other than `self`."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if private(node.attr) and not _of_self(node)}


def _of_self(node: ast.Attribute) -> bool:
    value = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
        else:
            continue
        if parts[0] != PACKAGE:
            yield from parts


def _attributes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg


def _strings(tree: ast.Module) -> Iterator[str]:
    """Strings that may name an attribute: complete ones, not parts of another string."""
    ends: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            ends |= set(map(id, ast.walk(node)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in _TEXT_METHODS:
                ends |= set(map(id, node.args))
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            values = [part.value for part in node.iter.elts if isinstance(part, ast.Constant)]
            if "" in values:  # suffixes of a name
                ends |= set(map(id, node.iter.elts))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in ends:
            continue
        if isinstance(node.value, str) and node.value not in sys.stdlib_module_names:
            yield node.value


def foreign_in_classes(module: Any, tree: ast.Module) -> set[str]:
    """Private names of foreign base classes that classes of `module` override, use or take as arguments."""
    found: set[str] = set()
    for node in ast.walk(tree):
        made = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if not isinstance(made, type):
            continue
        used = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        used |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        used |= {p.attr for p in ast.walk(node) if isinstance(p, ast.Attribute) and _of_self(p)}
        used |= own_attributes([node])
        bases = [b for b in made.__mro__ if b.__module__.partition(".")[0] != PACKAGE]
        found |= {name for name in used if private(name)} & {n for b in bases for n in _has(b)}
    return found


@functools.cache
def _has(base: type) -> set[str]:
    """Names that a class has, sets on its instances or takes as arguments."""
    if base.__module__ == "builtins":
        return set()
    found = set(vars(base))
    with contextlib.suppress(OSError, TypeError):  # compiled
        found |= set(re.findall(r"\bself\.(_\w+)", inspect.getsource(base)))
    for member in vars(base).values():
        code = getattr(member, "__code__", None)
        found |= set(code.co_varnames[: code.co_argcount] if code is not None else ())
    return found


def uses(root: Path) -> set[tuple[str, str]]:
    """`(file, private foreign name)` of all files; a module whose extra is missing is read, not imported."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in root.rglob("*.py")}
    own = own_attributes(list(trees.values()))
    found = {path: foreign_in(tree, own) for path, tree in trees.items()}
    inherited: set[str] = set()
    for path, tree in trees.items():
        if any(isinstance(node, ast.ClassDef) and node.bases for node in ast.walk(tree)):
            parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
            try:
                module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            except ImportError:
                continue
            names = foreign_in_classes(module, tree)
            found[path] |= names
            inherited |= names
    for path, tree in trees.items():
        found[path] |= read_of_others(tree) & inherited
    return {(path.relative_to(root).as_posix(), n) for path, names in found.items() for n in names}
