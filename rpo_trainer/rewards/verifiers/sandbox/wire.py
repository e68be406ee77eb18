"""Values and calls between the candidate process and the tester process.

Messages are JSON: the tester must not unpickle data of the candidate. Values of builtin types and some
standard library types are sent as copies, but only if the type matches exactly: an `int` subclass with
its own `__eq__` stays in its process, like all other objects, and the other side gets a `Proxy`
(proxies.py).
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any

from . import classes

_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_loads = json.JSONDecoder().decode
LARGEST = 1 << 28  # bytes of one message
_SCALARS = {int, float, str, bool, type(None)}
_SEQUENCES: dict[str, type] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
}  # fmt: skip
_MAPPINGS: dict[str, type] = {
    "dict": dict, "OrderedDict": collections.OrderedDict, "Counter": collections.Counter,
}  # fmt: skip
_NAME = {**{t: n for n, t in _SEQUENCES.items()}, **{t: n for n, t in _MAPPINGS.items()}}
_DATES: dict[type, Callable[[Any], list[Any]]] = {
    datetime.date: lambda d: [d.year, d.month, d.day],
    datetime.datetime: lambda d: [
        d.year,
        d.month,
        d.day,
        d.hour,
        d.minute,
        d.second,
        d.microsecond,
    ],
    datetime.time: lambda d: [d.hour, d.minute, d.second, d.microsecond],
    datetime.timedelta: lambda d: [d.days, d.seconds, d.microseconds],
}
_ZONES = (type(None), datetime.timezone)  # for other zones see `classes`
_DATE_NAMES: dict[str, Any] = {kind.__name__: kind for kind in _DATES}
_MUTABLE = (list, dict, set, bytearray, collections.deque, collections.defaultdict,
            collections.OrderedDict, collections.Counter)  # fmt: skip
_ARRAYS = "biufcSUmM"  # kinds of numpy arrays without objects


class Channel:
    """Frames of bytes over a pair of pipes."""

    def __init__(self, read: int, write: int, *, ahead: bool = True) -> None:
        self._read, self._write = read, write
        self._ahead = ahead  # may read more than requested
        self._buffer = b""
        self.closed = False
        self._os_read, self._os_write = os.read, os.write

    def send(self, message: Any) -> None:
        """Write one message."""
        data = _dumps(message).encode()
        rest = memoryview(struct.pack("=Q", len(data)) + data)
        try:
            while rest:
                rest = rest[self._os_write(self._write, rest) :]
        except BrokenPipeError:
            self.closed = True
            raise

    def receive(self) -> Any:
        """Read one message; EOFError if the other side closed the pipe."""
        (size,) = struct.unpack("=Q", self.exactly(8))
        if size > LARGEST:
            self.closed = True
            raise EOFError("a message is too long")
        return _loads(self.exactly(size).decode())

    def exactly(self, size: int) -> bytes:
        """Read `size` bytes."""
        parts = [self._buffer]
        missing = size - len(self._buffer)
        while missing > 0:
            part = self._os_read(self._read, max(missing, 4096) if self._ahead else missing)
            if not part:
                self.closed = True
                raise EOFError
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts) if len(parts) > 1 else parts[0]
        self._buffer = data[size:]
        return data[:size]


class Codec:
    """Encodes values for the other side; keeps the objects that stay on this side.

    `make` creates the local object for a remote one; `describe` adds what the other side needs to know
    about an object that stays here. `shared` names the classes that both sides have, in `names`.
    """

    def __init__(self, *, trusted: bool, make: Callable[[int, Any], Any], proxy: Any) -> None:
        self.trusted = trusted  # this is the tester
        self._make, self._proxy = make, proxy
        self.kept: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self.describe: Callable[[Any], Any] = lambda value: None
        self.shared: frozenset[str] = frozenset()
        self.names: dict[str, Any] = {}

    def keep(self, value: Any) -> int:
        """Return the number that the other side uses for `value`."""
        number = self._numbers.get(id(value))
        if number is None:
            number = len(self.kept)
            self._numbers[id(value)] = number
            self.kept[number] = value
        return number

    def is_shared(self, kind: Any) -> bool:
        """Whether the other side has this class too."""
        name = getattr(kind, "__name__", None) if self.shared and isinstance(kind, type) else None
        return type(name) is str and name in self.shared and self.names.get(name) is kind

    def encode(self, value: Any) -> Any:
        """Encode `value` for a message."""
        try:
            return self._encode(value)
        except RecursionError:  # it contains itself, or is nested too deeply
            return ["own", self.keep(value), self.describe(value)]

    def _encode(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in _SCALARS:
            return value
        if kind in (list, tuple) and set(map(type, value)) <= _SCALARS:
            return ["flat", _NAME[kind], value]
        if kind is collections.deque and value.maxlen is not None:
            return ["bounded", [self._encode(item) for item in value], value.maxlen]
        if kind in _NAME:
            if _NAME[kind] in _SEQUENCES:
                return ["items", _NAME[kind], [self._encode(item) for item in value]]
            pairs = [[self._encode(k), self._encode(v)] for k, v in value.items()]
            return ["pairs", _NAME[kind], pairs]
        if kind is self._proxy:
            return ["yours", self._proxy.number(value)]
        if kind is collections.defaultdict:
            pairs = [[self._encode(k), self._encode(v)] for k, v in value.items()]
            return ["default", self._encode(value.default_factory), pairs]
        if kind in (bytes, bytearray):
            return ["bytes", kind.__name__, value.decode("latin-1")]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", value.start, value.stop, value.step]
        if kind is slice:
            return ["slice", *[self._encode(v) for v in (value.start, value.stop, value.step)]]
        if kind is decimal.Decimal:
            return ["decimal", str(value)]
        if kind is fractions.Fraction:
            return ["fraction", value.numerator, value.denominator]
        if kind in _DATES and type(zone := getattr(value, "tzinfo", None)) in _ZONES:
            offset = None if zone is None else zone.utcoffset(None).total_seconds()
            return ["date", kind.__name__, _DATES[kind](value), offset]
        if value is Ellipsis or value is NotImplemented:
            return ["constant", repr(value)]
        name = getattr(value, "__name__", "") if callable(value) else ""
        known = type(name) is str and getattr(builtins, name, None) is value
        if kind is type and known:
            return ["type", name]
        if self.is_shared(value):
            return ["shared", name]
        if (named := classes.decompose(value)) is not None:
            return ["object", named[0], [self._encode(part) for part in named[1]]]
        if type(value).__module__ == "numpy" and "numpy" in sys.modules:
            import numpy

            if (
                isinstance(value, (numpy.ndarray, numpy.generic))
                and value.dtype.kind in _ARRAYS
                and kind in (numpy.ndarray, value.dtype.type)
            ):
                flat = value.tobytes().decode("latin-1")
                scalar = kind is not numpy.ndarray
                return ["array", value.dtype.str, list(value.shape), flat, scalar]
        if self.trusted and not callable(value) and not hasattr(value, "__next__"):
            try:
                return ["pickle", pickle.dumps(value).decode("latin-1")]
            except Exception:
                pass  # its class is defined by the test: it stays here
        if self.trusted and known:
            return ["builtin", name]
        return ["own", self.keep(value), self.describe(value)]

    def decode(self, data: Any) -> Any:
        """Decode a value of a message."""
        if type(data) is not list:
            return data
        tag, *rest = data
        if tag == "flat":
            return _SEQUENCES[rest[0]](rest[1])  # a copy: the message is not changed
        if tag == "items":
            return _SEQUENCES[rest[0]](self.decode(item) for item in rest[1])
        if tag == "bounded":
            return collections.deque(map(self.decode, rest[0]), maxlen=rest[1])
        if tag == "pairs":
            return _MAPPINGS[rest[0]]({self.decode(k): self.decode(v) for k, v in rest[1]})
        if tag == "default":
            pairs = {self.decode(k): self.decode(v) for k, v in rest[1]}
            return collections.defaultdict(self.decode(rest[0]), pairs)
        if tag == "yours":
            return self.kept[rest[0]]
        if tag == "own":
            return self._make(rest[0], rest[1])
        if tag == "bytes":
            raw = rest[1].encode("latin-1")
            return bytearray(raw) if rest[0] == "bytearray" else raw
        if tag == "complex":
            return complex(*rest)
        if tag == "range":
            return range(*rest)
        if tag == "slice":
            return slice(*map(self.decode, rest))
        if tag == "decimal":
            return decimal.Decimal(rest[0])
        if tag == "fraction":
            return fractions.Fraction(*rest)
        if tag == "date":
            date = _DATE_NAMES[rest[0]](*rest[1])
            if rest[2] is None:
                return date
            return date.replace(tzinfo=datetime.timezone(datetime.timedelta(seconds=rest[2])))
        if tag == "constant":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[rest[0]]
        if tag == "shared" and rest[0] in self.shared:
            return self.names[rest[0]]
        if tag == "object":
            return classes.compose(rest[0], [self.decode(part) for part in rest[1]])
        if tag == "type" and isinstance(found := getattr(builtins, rest[0]), type):
            return found
        if tag == "array":
            return _array(*rest)
        if not self.trusted and tag == "pickle":  # from the tester, which the candidate trusts
            return pickle.loads(rest[0].encode("latin-1"))
        if not self.trusted and tag == "builtin":
            return getattr(builtins, rest[0])
        raise ValueError("not a value")


def _array(kind: str, shape: list[int], data: str, scalar: bool) -> Any:
    import numpy

    dtype = numpy.dtype(kind)
    if dtype.kind not in _ARRAYS:
        raise ValueError("not an array of plain values")
    array = numpy.frombuffer(data.encode("latin-1"), dtype).reshape(shape).copy()
    return array[()] if scalar else array


def mutable(value: Any) -> bool:
    """Whether a call can change the value, which is sent as a copy."""
    if type(value) is tuple:
        return any(map(mutable, value))
    return type(value) in _MUTABLE or type(value).__name__ == "ndarray"


def update(old: Any, new: Any) -> None:
    """Replace the contents of `old` by those of `new`, a copy that a call changed."""
    if type(old) is not type(new) or old is new:
        return
    if type(old) in (list, tuple, collections.deque):
        merged = list(new)
        if len(old) == len(new):
            for i, (before, after) in enumerate(zip(old, new, strict=True)):
                if type(before) is type(after) and mutable(before):
                    update(before, after)
                    merged[i] = before
        if type(old) is not tuple:
            old.clear()
            old.extend(merged)
    elif isinstance(old, dict):
        for key, after in list(new.items()):
            if key in old and type(old[key]) is type(after) and mutable(after):
                update(old[key], after)
                new[key] = old[key]
        old.clear()
        old.update(new)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) is bytearray:
        old[:] = new
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new
