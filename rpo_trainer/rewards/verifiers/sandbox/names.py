"""Name lookup of tests: their own names, builtins, then those of the response."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import sys
import types
from collections.abc import Callable, Container
from typing import Any

from .peer import Peer
from .proxies import TEST_MODULE, Proxy

# Modules without state. If a test uses names that the response imported from them, the tester's own
# library is used, so that a response's `math.isclose` does not decide a test.
_LIBRARY = {
    "abc", "array", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc",
    "contextlib", "copy", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions",
    "functools", "hashlib", "heapq", "html", "io", "ipaddress", "itertools", "json", "math",
    "numbers", "numpy", "operator", "pathlib", "re", "statistics", "string", "struct", "textwrap",
    "types", "typing", "unicodedata", "unittest", "unittest.mock", "urllib.parse", "uuid", "zlib",
    "zoneinfo",
}  # fmt: skip
# Names that always mean the module, even if the response uses them for something else.
_MODULES = {
    "cmath", "collections", "functools", "heapq", "itertools", "math", "np", "numpy", "operator",
    "re", "unittest",
}  # fmt: skip
# Names that mean the module if a test uses `NAME.something`. Otherwise the response may have a function
# or plain data of that name.
_MODULES_OR_OTHER = {
    "bisect", "copy", "datetime", "decimal", "fractions", "json", "numbers", "statistics", "string",
    "typing",
}  # fmt: skip


def look_up(namespace: dict[str, Any], name: str) -> list[Any]:
    """In the candidate: return the value of a name and its origin, or [] if it is undefined.

    The origin is `["function"]`, `["module", its name]`, `["from", module, name]` for a class or
    function of a module, else `[]`.
    """
    if name not in namespace:
        return []
    value = namespace[name]
    if type(value) is types.ModuleType:
        return [value, ["module", str(value.__name__)]]
    if not callable(value):
        return [value, []]
    module, qualified = (getattr(value, a, None) for a in ("__module__", "__qualname__"))
    if type(module) is str and module in _LIBRARY and qualified == name:
        return [value, ["from", module, name]]
    return [value, [] if isinstance(value, type) else ["function"]]


class _TypeOfType(type):
    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if cls is not Type or len(arguments) != 1:
            return super().__call__(*arguments, **named)
        kind = type(arguments[0])
        kind = arguments[0].__class__ if kind is Proxy else kind
        return Type if kind is type else kind

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type) if cls is Type else super().__instancecheck__(value)


class Type(type, metaclass=_TypeOfType):
    """The builtin `type` for tests: objects of the response have their class in the response."""


def is_instance(value: Any, kinds: Any) -> bool:
    """Replace the builtin `isinstance` in tests: library classes apply to objects of the response."""
    if type(value) is not Proxy:
        return isinstance(value, kinds)
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if isinstance(kind, tuple):
            found = is_instance(value, kind)
        elif isinstance(kind, type) and kind.__module__ in (*_LIBRARY, "builtins"):
            place = kind.__module__, kind.__qualname__
            if place[0] == "builtins" and not hasattr(builtins, place[1]):  # GeneratorType, ...
                names = [name for name, known in vars(types).items() if known is kind]
                place = "types", names[0] if names else place[1]
            peer = object.__getattribute__(value, "_peer")
            found = peer.ask("isinstance", value, place, {})
        else:
            found = isinstance(value, kind)
        if found:
            return True
    return False


class _Module(types.ModuleType):
    """The module of the tests, where `dataclasses` and `typing` look up names.

    `pickle` does not find them: objects of classes that a test defines stay in this process.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(TEST_MODULE)
        object.__setattr__(self, "names", names)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return object.__getattribute__(self, "names")  # type: ignore[no-any-return]


class Names(dict[str, Any]):
    """The namespace of the tests; missing names are looked up in the response."""

    def __init__(self, peer: Peer, source: str) -> None:
        super().__init__(
            __name__=TEST_MODULE, __builtins__=builtins, type=Type, isinstance=is_instance
        )
        sys.modules[TEST_MODULE] = _Module(self)
        self._peer = peer
        self._dotted = set(re.findall(r"\b(\w+)\s*\.", source)) & _MODULES_OR_OTHER
        self.start: Callable[[], None] | None = None  # called before the first request

    def _ask(self, name: str) -> list[Any]:
        if self.start is not None:
            self.start()
        found = self._peer.ask("lookup", name, (), {})
        if type(found) is not list or len(found) != 2 or type(found[1]) is not list:
            return [None, None]
        return found

    def __missing__(self, name: str) -> Any:
        if name in builtins.__dict__ or name.startswith("__"):
            raise KeyError(name)
        value, origin = self._ask(name)
        if origin is None:
            raise KeyError(name)
        if name in _MODULES:
            origin = ["module", "numpy" if name == "np" else name]
        elif (
            name in _MODULES_OR_OTHER
            and (origin == [] or (origin == ["function"] and name in self._dotted))
            and type(value) is Proxy
        ):
            origin = ["module", name]
        if origin and origin[0] in ("module", "from") and origin[1] in _LIBRARY:
            own = importlib.import_module(origin[1])
            # Only under its own name: other functions that tests call are the response's.
            value = own if origin[0] == "module" else getattr(own, name)
            self[name] = value
        elif origin == ["function"]:  # functions do not change: one request is enough
            self[name] = value
        return value

    def is_function(self, name: str) -> bool:
        """Whether the response has a function of this name."""
        return bool(self._ask(name)[1] == ["function"])

    def take_tested_builtin(self, tests: list[str]) -> None:
        """Resolve a builtin name in the response, for tasks that require a function named `sum`, for example.

        Only if the tests use no other name of the response, and exactly one such function may be tested:
        otherwise a response could replace `abs`, and with it the comparison.
        """
        others, about = _builtins_in(tests, self)
        optional = _MODULES | _MODULES_OR_OTHER
        if any(name not in optional or self.is_function(name) for name in others):
            return
        defined = [name for name in sorted(about) if self.is_function(name)]
        if len(defined) == 1:
            self[defined[0]] = self._ask(defined[0])[0]


def _builtins_in(tests: list[str], known: Container[str]) -> tuple[set[str], set[str]]:
    """Return the names that tests use from the response, and the builtin functions they may test.

    A tested function is called with values, not with results of other calls, as `abs` in `abs(sum(x) - 1)`.
    """
    loaded: set[str] = set()
    stored: set[str] = set()
    called: set[str] = set()
    helping: set[str] = set()
    for tree in filter(None, map(_parse, tests)):
        computed: set[str] = set()  # names with results of calls
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
            elif isinstance(node, ast.arg):
                stored.add(node.arg)
                computed.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                stored.add(node.name)
            elif isinstance(node, ast.alias):
                stored.add(node.asname or node.name)
            source = getattr(node, "value", None) or getattr(node, "iter", None)
            if isinstance(source, ast.AST) and _calls(source, computed):
                computed |= _stored(node)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(node.func, ast.Name):
                nested = any(_calls(part, computed) for part in given)
                (helping if nested else called).add(node.func.id)
                if not hasattr(builtins, node.func.id):  # for example check(sum)
                    called |= {part.id for part in given if isinstance(part, ast.Name)}
    loaded -= stored
    others = {name for name in loaded if name not in known and not hasattr(builtins, name)}
    about = {name for name in (called - helping) & loaded if name in builtins.__dict__}
    return others, {name for name in about if not isinstance(getattr(builtins, name), type)}


def _parse(test: str) -> ast.Module | None:
    try:
        return ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the test fails on its own


def _stored(node: ast.AST) -> set[str]:
    return {
        name.id
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }


def _calls(node: ast.AST, computed: set[str]) -> bool:
    """Whether an expression calls anything but builtin classes such as `list`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in computed:
            return True
        if isinstance(part, ast.Call):
            name = part.func.id if isinstance(part.func, ast.Name) else ""
            if not isinstance(getattr(builtins, name, None), type):
                return True
    return False
