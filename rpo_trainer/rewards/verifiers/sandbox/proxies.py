"""Objects of the other process: a `Proxy` forwards all operations.

Comparisons that decide a test happen in the tester. A proxy equals a plain value only if its object extends a
builtin type without changing its equality (a named tuple, an integer enum); then the underlying value is
fetched and compared in the tester. The other operand is not sent.

An object computed from a value of the test ("fed") may contain the expected result. Its operators return
no plain value to the test: it is not equal to one, and has no order, number, truth value or length.
"""

from __future__ import annotations

import builtins
import datetime
import decimal
import fractions
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol, cast

from .classes import copied

TEST_MODULE = "__test__"  # __name__ of the tests' namespace
RESPONSE_MODULE = "__response__"  # and of the response's
_BASES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
_FIXED = {bool, int, float, complex, str, bytes, tuple, frozenset}
_VIEWS = {type({}.keys()): set, type({}.items()): set, type(type.__dict__): dict}
_ORDER = ("lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift",
           "and", "or", "xor", "divmod")  # fmt: skip
_UNARY = ("neg", "pos", "abs", "invert", "int", "float", "complex", "index", "round", "trunc",
          "floor", "ceil", "bool", "len", "hash")  # fmt: skip
_OTHERS = ("str", "repr", "format", "bytes", "iter", "next", "reversed", "getitem", "setitem",
           "delitem", "contains", "enter", "exit", "instancecheck", "subclasscheck", "missing")  # fmt: skip
# Values that a class of the response may legitimately compute with: its objects then keep items,
# attributes and text. With other values (sets, dates, arrays, ...) it most likely imitates such a value.
_NUMBERS = (int, float, bool, complex, str, bytes, type(None), decimal.Decimal, fractions.Fraction)
_CONTENTS = ("iter", "next", "reversed", "getitem", "str", "repr", "format", "bytes")
_PLAIN_NAMES = {
    name
    for kind in (list, dict, set, datetime.datetime, datetime.timedelta)
    for name in dir(kind)
    if not name.startswith("_")
} | {"all", "any", "sum", "max", "min", "mean", "std", "var", "item", "tolist", "size", "shape",
     "ravel", "flatten", "nonzero", "empty", "equals"}  # fmt: skip


def _special(name: str) -> Callable[..., Any]:
    def call(value: Any, *arguments: Any) -> Any:
        return getattr(type(value), f"__{name}__")(value, *arguments)

    return call


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_ORDER, "eq", "ne")},
    **{name: getattr(operator, name, None) or getattr(operator, name + "_") for name in _BINARY[:-1]},
    **{name: _special(name) for name in (*_UNARY, *_OTHERS)},
    **{name: getattr(builtins, name) for name in
       ("divmod", "abs", "int", "float", "complex", "round", "bool", "len", "hash", "str", "repr",
        "format", "bytes", "iter", "next", "reversed", "getattr", "setattr", "delattr")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "contains")},
    "instancecheck": lambda kind, value: isinstance(value, kind),
    "subclasscheck": lambda kind, value: issubclass(value, kind),
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "dir": dir,
}  # fmt: skip


def _value(target: Any) -> Any:
    """Return the plain value of an object whose class extends a builtin type; else the object."""
    kind = type(target)
    if kind in _VIEWS:
        return _VIEWS[kind](target)
    for base in _BASES:
        if issubclass(kind, base):
            if kind.__eq__ is base.__eq__ and kind.__ne__ is base.__ne__:
                return base(target) if base is not str else str.__str__(target)
            break
    return copied(target)


def _isinstance(target: Any, module: str, name: str) -> bool:
    kind: Any = types if module == "types" else sys.modules.get(module)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return isinstance(kind, type) and isinstance(target, kind)


OPERATIONS.update(value=_value, isinstance=_isinstance)


class Asks(Protocol):
    """The part of `Peer` that proxies use."""

    trusted: bool

    def ask(self, operation: str, target: Any, arguments: tuple[Any, ...], named: Any) -> Any:
        """Have the other side perform an operation."""


class Proxy:
    """An object of the other process."""

    __slots__ = ("_fed", "_number", "_peer", "_same")

    def __init__(self, peer: Asks, number: int, fed: int = 0) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        # Whether the object was computed from a value of the test: 1 a number or text, 2 another.
        object.__setattr__(self, "_fed", fed)

    @staticmethod
    def number(proxy: Proxy) -> int:
        """Return the number of the object on the other side."""
        return cast(int, object.__getattribute__(proxy, "_number"))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", *arguments, **named)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        try:
            return _ask(self, "getattr", "__class__")
        except AttributeError:
            return Proxy

    def __getattr__(self, name: str) -> Any:
        # numpy would read memory at an address that the object provides.
        if name in ("__array_interface__", "__array_struct__", "__array_priority__"):
            raise AttributeError(name)
        fed = _fed(self)
        if (fed and name.startswith("__") and name not in ("__dict__", "__name__")) or (
            fed > 1 and name in _PLAIN_NAMES
        ):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delattr", name)

    def __dir__(self) -> Any:
        return _ask(self, "dir")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an object of the response cannot be pickled or copied by a test")

    def __eq__(self, other: object) -> bool:
        if type(other) is Proxy:
            return self is other or bool(_ask(self, "eq", other))
        if _of_a_class(other):
            return NotImplemented
        if _fed(self):
            return False
        value = _plain(self)
        return type(value) is not Proxy and bool(value == other)

    def __ne__(self, other: object) -> bool:
        if type(other) is Proxy:
            return self is not other and bool(_ask(self, "ne", other))
        if _of_a_class(other):
            return NotImplemented
        return not self == other

    def __hash__(self) -> int:
        return cast(int, _ask(self, "hash"))


def _ask(proxy: Proxy, operation: str, *arguments: Any, **named: Any) -> Any:
    peer = object.__getattribute__(proxy, "_peer")
    return peer.ask(operation, proxy, arguments, named)


def _plain(proxy: Proxy) -> Any:
    """Return the plain value of the object, the same for all comparisons; the proxy if there is none."""
    try:
        return object.__getattribute__(proxy, "_same")
    except AttributeError:
        pass
    value = _ask(proxy, "value")
    if type(value) in _FIXED:
        try:
            hash(value)  # fails if a part of it is mutable
        except TypeError:
            return value
        object.__setattr__(proxy, "_same", value)
    return value


def _fed(value: Any) -> int:
    return cast(int, object.__getattribute__(value, "_fed")) if type(value) is Proxy else 0


def _of_a_class(value: Any) -> bool:
    """Whether the class of the value is defined by the test or response, so that its methods decide."""
    return type(value).__module__ in (TEST_MODULE, RESPONSE_MODULE)


def _refuse(name: str) -> Any:
    raise TypeError(f"{name!r} of an object of the response and a value of the test")


def _order(name: str) -> Callable[[Proxy, Any], Any]:
    compare = OPERATIONS[name]

    def method(self: Proxy, other: Any) -> Any:
        if _fed(self) or _fed(other):
            return _refuse(name)
        if type(other) is Proxy:
            return _ask(self, name, other)
        if _of_a_class(other):
            return NotImplemented
        value = _plain(self)
        return _refuse(name) if type(value) is Proxy else compare(value, other)

    return method


def _binary(name: str, reflected: bool) -> Callable[..., Any]:
    function = OPERATIONS[name]

    def method(self: Proxy, other: Any, *modulus: Any) -> Any:
        fed = max(_fed(self), _fed(other))
        if type(other) is not Proxy:
            value = self if fed else _plain(self)
            if type(value) is not Proxy:
                pair = (other, value) if reflected else (value, other)
                return function(*pair, *modulus)
            fed = max(fed, 1 if type(other) in _NUMBERS else 2)
        if reflected:
            peer = object.__getattribute__(self, "_peer")
            result = peer.ask(name, other, (self, *modulus), {})
        else:
            result = _ask(self, name, other, *modulus)
        if fed and type(result) is not Proxy:  # it may be tailored to the value of the test
            return _refuse(name)
        if fed:
            return Proxy(object.__getattribute__(self, "_peer"), Proxy.number(result), fed)
        return result

    return method


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Proxy, *arguments: Any) -> Any:
        fed = _fed(self)
        if fed and (
            (name in _UNARY and name != "hash")
            or name == "contains"
            or (name == "format" and arguments[0])
            or (fed > 1 and name in _CONTENTS)
        ):
            return _refuse(name)
        return _ask(self, name, *arguments)

    return method


def _exit(self: Proxy, kind: Any, error: Any, trace: Any) -> Any:
    return _ask(self, "exit", kind, error, None)


for _name in _ORDER:
    setattr(Proxy, f"__{_name}__", _order(_name))
for _name in _BINARY:
    setattr(Proxy, f"__{_name}__", _binary(_name, reflected=False))
    setattr(Proxy, f"__r{_name}__", _binary(_name, reflected=True))
for _name in (*_UNARY, *_OTHERS):
    if _name != "hash":
        setattr(Proxy, f"__{_name}__", _forward(_name))
Proxy.__exit__ = _exit  # type: ignore[attr-defined]
Proxy.__doc__ = property(lambda self: _ask(self, "getattr", "__doc__"))  # type: ignore[assignment]
