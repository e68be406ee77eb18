"""Standard library objects that are sent as copies: their class and plain arguments.

Immutable objects are always sent as copies. Others stay in their process, since a test may observe
changes; for a comparison they are copied (`Copy`).
"""

from __future__ import annotations

import array
import collections
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

_Take = Callable[[Any], list[Any]]


def _date(value: Any) -> list[Any]:
    if type(value.tzinfo).__name__ not in ("timezone", "ZoneInfo"):
        raise ValueError("a zone of another class")
    return [value.replace(tzinfo=None, fold=0), value.tzinfo, value.fold]


def _text(value: Any) -> list[Any]:
    return [str(value)]


# The parts of an object, by module and class. Modules are imported on demand.
_PARTS: dict[tuple[str, str], _Take] = {
    ("uuid", "UUID"): lambda value: [value.hex],
    ("zoneinfo", "ZoneInfo"): lambda value: [value.key],
    ("datetime", "timezone"): lambda value: list(value.__getinitargs__()),
    ("datetime", "datetime"): _date,
    ("datetime", "time"): _date,
    **{("pathlib", name): _text for name in
       ("PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath")},
    **{("ipaddress", f"IPv{n}{name}"): _text for n in (4, 6)
       for name in ("Address", "Network", "Interface")},
}  # fmt: skip
_COPIED: dict[type, tuple[str, _Take]] = {
    array.array: ("array", lambda value: [value.typecode, value.tolist()]),
    memoryview: ("memoryview", lambda value: [value.tobytes()]),
    types.SimpleNamespace: ("namespace", lambda value: [dict(vars(value))]),
    collections.ChainMap: ("ChainMap", lambda value: list(value.maps)),
    collections.UserList: ("UserList", lambda value: [value.data]),
    collections.UserDict: ("UserDict", lambda value: [value.data]),
    collections.UserString: ("UserString", lambda value: [value.data]),
}
_MAKERS: dict[str, Callable[..., Any]] = {
    "array": array.array,
    "memoryview": memoryview,
    "namespace": lambda values: types.SimpleNamespace(**values),
    "ChainMap": collections.ChainMap,
    "UserList": collections.UserList,
    "UserDict": collections.UserDict,
    "UserString": collections.UserString,
}


class Copy:
    """Marks an object that is sent as a copy."""

    def __init__(self, value: Any) -> None:
        self.value = value


def copied(value: Any) -> Any:
    """Return the object, wrapped in `Copy` if objects of its class are not sent otherwise."""
    return Copy(value) if type(value) in _COPIED else value


def decompose(value: Any) -> tuple[list[str], list[Any]] | None:
    """Return the class and the parts of an object; None if it is not sent."""
    kind: Any = type(value)
    try:
        if kind is Copy:
            name, take = _COPIED[type(value.value)]
            return [name], take(value.value)
        module, name = kind.__module__.split(".")[0], kind.__name__
        if (module, name) in _PARTS and getattr(sys.modules[module], name) is kind:
            return [module, name], _PARTS[module, name](value)
    except Exception:
        pass  # for example a time zone read from a file
    return None


def compose(kind: list[str], parts: list[Any]) -> Any:
    """Rebuild the object from the result of `decompose`."""
    if len(kind) == 1:
        return _MAKERS[kind[0]](*parts)
    module, name = kind
    if (module, name) not in _PARTS:
        raise ValueError("not a class that is sent as a copy")
    if name in ("datetime", "time"):
        return parts[0].replace(tzinfo=parts[1], fold=parts[2])
    return getattr(importlib.import_module(module), name)(*parts)
