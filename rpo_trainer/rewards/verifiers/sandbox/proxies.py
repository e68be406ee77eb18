"""Objects of the other process: a `Proxy` forwards what is done with it; a `Peer` serves requests.

Comparisons that decide a test happen in the tester. A proxy equals no plain value unless its object
extends a builtin type without changing its equality (a named tuple, an enum of integers); then the
underlying value is fetched and compared in the tester. The other operand is not sent.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable
from typing import Any, cast

from .wire import Channel, Codec, mutable, update

TEST_MODULE = "__test__"  # __name__ of the tests' namespace
_BASES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
_VIEWS = {type({}.keys()): set, type({}.items()): set, type(type.__dict__): dict}
_ORDER = ("lt", "le", "gt", "ge")
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift",
           "and", "or", "xor", "divmod")  # fmt: skip
_UNARY = ("neg", "pos", "abs", "invert", "int", "float", "complex", "index", "round", "trunc",
          "floor", "ceil", "bool", "len", "hash")  # fmt: skip
_OTHERS = ("str", "repr", "format", "bytes", "iter", "next", "reversed", "getitem", "setitem",
           "delitem", "contains", "enter", "exit", "instancecheck", "subclasscheck", "missing")  # fmt: skip


def _special(name: str) -> Callable[..., Any]:
    def call(value: Any, *arguments: Any) -> Any:
        return getattr(type(value), f"__{name}__")(value, *arguments)

    return call


_OPERATIONS: dict[str, Callable[..., Any]] = {
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
    """The plain value under an object of a class that extends a builtin type; else the object."""
    kind = type(target)
    if kind in _VIEWS:
        return _VIEWS[kind](target)
    for base in _BASES:
        if issubclass(kind, base):
            if kind.__eq__ is base.__eq__ and kind.__ne__ is base.__ne__:
                return base(target) if base is not str else str.__str__(target)
            break
    return target


_OPERATIONS["value"] = _value


class Proxy:
    """An object of the other process."""

    __slots__ = ("_fed", "_number", "_peer")

    def __init__(self, peer: Peer, number: int, fed: bool = False) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        # Whether the object was computed with a plain value of the test: then the object's methods
        # may know what the test expects, and don't decide what it is compared with.
        object.__setattr__(self, "_fed", fed)

    @staticmethod
    def number(proxy: Proxy) -> int:
        """The number under which the other side keeps the object."""
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
        value = _plain(self)
        return type(value) is not Proxy and bool(value == other)

    def __ne__(self, other: object) -> bool:
        if type(other) is Proxy:
            return self is not other and bool(_ask(self, "ne", other))
        return not self == other

    def __hash__(self) -> int:
        return cast(int, _ask(self, "hash"))


def _ask(proxy: Proxy, operation: str, *arguments: Any, **named: Any) -> Any:
    peer = object.__getattribute__(proxy, "_peer")
    return peer.ask(operation, proxy, arguments, named)


def _plain(proxy: Proxy) -> Any:
    return _ask(proxy, "value")


def _fed(value: Any) -> bool:
    return type(value) is Proxy and bool(object.__getattribute__(value, "_fed"))


def _refuse(name: str) -> Any:
    raise TypeError(f"{name!r} of an object of the response and a value of the test")


def _order(name: str) -> Callable[[Proxy, Any], Any]:
    compare = _OPERATIONS[name]

    def method(self: Proxy, other: Any) -> Any:
        if type(other) is Proxy and not _fed(self) and not _fed(other):
            return _ask(self, name, other)
        value = _plain(self)
        return _refuse(name) if type(value) is Proxy else compare(value, other)

    return method


def _binary(name: str, reflected: bool) -> Callable[..., Any]:
    function = _OPERATIONS[name]

    def method(self: Proxy, other: Any, *modulus: Any) -> Any:
        fed = _fed(self) or _fed(other)
        if type(other) is not Proxy:
            fed = True
            value = _plain(self)
            if type(value) is not Proxy:
                pair = (other, value) if reflected else (value, other)
                return function(*pair, *modulus)
        if reflected:
            peer = object.__getattribute__(self, "_peer")
            result = peer.ask(name, other, (self, *modulus), {})
        else:
            result = _ask(self, name, other, *modulus)
        if fed and type(result) is not Proxy:  # it may be made to fit the test's value
            return _refuse(name)
        if fed:
            return Proxy(object.__getattribute__(self, "_peer"), Proxy.number(result), fed=True)
        return result

    return method


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Proxy, *arguments: Any) -> Any:
        if name in _UNARY and _fed(self) and name != "hash":
            return _refuse(name)
        return _ask(self, name, *arguments)

    return method


def _enter(self: Proxy) -> Any:
    return _ask(self, "enter")


def _exit(self: Proxy, kind: Any, error: Any, trace: Any) -> Any:
    return _ask(self, "exit", kind, error, None)


def _iterate(self: Proxy) -> Any:
    return _ask(self, "iter")


for _name in _ORDER:
    setattr(Proxy, f"__{_name}__", _order(_name))
for _name in _BINARY:
    setattr(Proxy, f"__{_name}__", _binary(_name, reflected=False))
    setattr(Proxy, f"__r{_name}__", _binary(_name, reflected=True))
for _name in (*_UNARY, *_OTHERS):
    if _name != "hash":
        setattr(Proxy, f"__{_name}__", _forward(_name))
Proxy.__exit__ = _exit  # type: ignore[attr-defined]


class Peer:
    """One end of the connection: asks the other end, and serves its requests meanwhile."""

    def __init__(self, channel: Channel, *, trusted: bool) -> None:
        self.channel, self.trusted = channel, trusted
        self.codec = Codec(trusted=trusted, make=self._make, proxy=Proxy)
        self.codec.describe = self._describe
        self.lookup: Callable[[str], Any] | None = None
        self._proxies: dict[int, Any] = {}

    def ask(self, operation: str, target: Any, arguments: tuple[Any, ...], named: Any) -> Any:
        """Has the other side carry out an operation."""
        encode = self.codec.encode
        self.channel.send([
            operation, encode(target), [encode(a) for a in arguments],
            {key: encode(value) for key, value in named.items()},
        ])  # fmt: skip
        while True:
            message = self.channel.receive()
            if message[0] == "result":
                break
            self.serve(message)
        _, result, error, changed = message
        if changed:
            values = [*arguments, *named.values()]
            for place, data in changed:
                update(values[place], self.codec.decode(data))
        if error is not None:
            raise self._exception(error)
        return self.codec.decode(result)

    def serve(self, message: Any) -> None:
        """Carries out one request of the other side, and answers."""
        operation, target, arguments, named = message
        result = error = None
        values: list[Any] = []
        changed = []
        try:
            if operation == "lookup" and self.lookup is not None:
                result = self.lookup(target)
            else:
                where = self.codec.decode(target)
                values = [self.codec.decode(a) for a in arguments]
                keywords = {key: self.codec.decode(a) for key, a in named.items()}
                if self.trusted:
                    _check(operation, where, values)
                result = _OPERATIONS[operation](where, *values, **keywords)
                values += keywords.values()
            result = self.codec.encode(result)
        except BaseException as e:  # SystemExit too; the test decides what it means
            if isinstance(e, (EOFError, OSError)) and self.trusted:
                raise
            result, error = None, self._raised(e)
        sent = [*arguments, *named.values()]
        for place, value in enumerate(values):
            if mutable(value) and (data := self.codec.encode(value)) != sent[place]:
                changed.append([place, data])
        self.channel.send(["result", result, error, changed])

    def _describe(self, value: Any) -> Any:
        """What the other side must know of an object that it gets a proxy for."""
        if not (isinstance(value, type) and issubclass(value, BaseException)):
            return None
        own: list[Any] = []
        for kind in value.__mro__:
            if kind.__module__ == "builtins":
                return ["exception", own, [None, kind.__name__]]
            if kind.__module__.split(".")[0] in sys.stdlib_module_names:
                return ["exception", own, [kind.__module__, kind.__qualname__]]
            if issubclass(kind, BaseException):
                own.append([self.codec.keep(kind), kind.__name__])
        return None

    def _make(self, number: int, facts: Any) -> Any:
        if number not in self._proxies:
            if facts and facts[0] == "exception":
                self._proxies[number] = self._exception_class(facts[1], facts[2])
            else:
                self._proxies[number] = Proxy(self, number)
        return self._proxies[number]

    def _raised(self, error: BaseException) -> Any:
        try:
            arguments = [self.codec.encode(a) for a in error.args]
            facts = self._describe(type(error)) or ["exception", [], [None, type(error).__name__]]
            return [facts[1], facts[2], arguments, self.codec.keep(error)]
        except Exception:
            return [[], [None, "RuntimeError"], ["an exception that cannot be described"], None]

    def _exception(self, error: Any) -> BaseException:
        own, base, arguments, number = error
        kind = self._exception_class(own, base)
        values = [self.codec.decode(a) for a in arguments]
        if not own:
            try:
                return cast(BaseException, kind(*values))
            except Exception:
                return cast(BaseException, kind.__new__(kind, *values))
        raised = kind.__new__(kind, *values)
        raised.__dict__["_remote"] = self._make(number, None)
        return cast(BaseException, raised)

    def _exception_class(self, own: list[Any], base: Any) -> Any:
        """A class here for an exception class there, so that `except` finds it."""
        module, name = base
        found = getattr(sys.modules.get(module or "builtins"), name, None)
        kind: Any = found if isinstance(found, type) and issubclass(found, BaseException) else None
        kind = kind or Exception
        for number, called in reversed(own):
            known = self._proxies.get(number)
            if not isinstance(known, type):
                known = type(called, (kind,), self._forwarding(number))
                self._proxies[number] = known
            kind = known
        return kind

    def _forwarding(self, number: int) -> dict[str, Any]:
        def init(self: Any, *arguments: Any, **named: Any) -> None:
            self.__dict__["_remote"] = peer.ask("call", Proxy(peer, number), arguments, named)

        def attribute(self: Any, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.__dict__["_remote"], name)

        def text(self: Any) -> str:
            return str(self.__dict__["_remote"])

        peer = self
        return {"__init__": init, "__getattr__": attribute, "__str__": text}


def _check(operation: str, target: Any, arguments: list[Any]) -> None:
    """What the candidate may do with an object of the tester: call it, iterate, use its interface."""
    if operation in ("call", "next", "iter"):
        return
    if type(target).__module__ != TEST_MODULE or operation in ("delattr", "dir"):
        kind = AttributeError if operation.endswith("attr") else TypeError
        raise kind("the object belongs to the test")
    if operation in ("getattr", "setattr") and (
        type(arguments[0]) is not str or arguments[0].startswith("_")
    ):
        raise AttributeError("private attributes of the test's objects cannot be used")
