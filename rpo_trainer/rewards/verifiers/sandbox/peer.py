"""One end of the connection between the two processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

from . import exceptions, streams
from .proxies import OPERATIONS, TEST_MODULE, Proxy
from .wire import Channel, Codec, mutable, update

# Library classes whose objects a test may pass to a response.
_FILES = (io.StringIO, io.BytesIO, io.TextIOWrapper, io.BufferedReader, io.BufferedWriter,
          io.BufferedRandom)  # fmt: skip


class Peer:
    """One end of the connection: sends requests, and serves those of the other end meanwhile."""

    def __init__(self, channel: Channel, *, trusted: bool) -> None:
        self.channel, self.trusted = channel, trusted
        self.codec = Codec(trusted=trusted, make=self._make, proxy=Proxy)
        self.codec.describe = self._describe
        self.lookup: Callable[[str], Any] | None = None
        # Sent with each message: printed text to the tester, and to the candidate whether the test replaced
        # `print`.
        self.note: Callable[[], str] = str
        self.read_note: Callable[[str], Any] = str
        self.serving = 0  # requests being served
        self.asked = 0
        self.stops = False  # whether a test expects StopIteration from calls other than next()
        self._proxies: dict[int, Any] = {}

    def ask(self, operation: str, target: Any, arguments: tuple[Any, ...], named: Any) -> Any:
        """Have the other side perform an operation."""
        self.asked += 1
        values = [*arguments, *named.values()]
        sent = self._encode(values)
        message = [operation, self.codec.encode(target), sent[: len(arguments)],
                   dict(zip(named, sent[len(arguments) :], strict=True))]  # fmt: skip
        self.channel.send([*message, text] if (text := self.note()) else message)
        while True:
            message = self.channel.receive()
            if message[0] == "result":
                break
            self.serve(message)
        result, error, changed = message[1:4]
        self.read_note(str(message[4]) if len(message) > 4 else "")
        for place, data in changed or ():
            update(values[place], self.codec.decode(data))
        if error is not None:
            raised = self._exception(error)
            if isinstance(raised, StopIteration) and operation != "next" and not self.stops:
                # In a test it would silently end a loop over map() or similar.
                raise RuntimeError("the response raised StopIteration") from raised
            raise raised
        if type(result) is list and result[0] == "argument":
            return values[result[1]]
        return self.codec.decode(result)

    def serve(self, message: Any) -> None:
        """Perform one request of the other side, and reply."""
        operation, target, arguments, named = message[:4]
        self.read_note(str(message[4]) if len(message) > 4 else "")
        result = error = None
        sent = [*arguments, *named.values()]
        values: list[Any] = []
        changed = []
        self.serving += 1
        try:
            for data in sent:
                repeated = type(data) is list and data[0] == "same"
                values.append(values[data[1]] if repeated else self.codec.decode(data))
            result = self._carry_out(operation, target, values, named)
            places = [i for i, value in enumerate(values) if value is result and mutable(value)]
            result = ["argument", places[0]] if places else self.codec.encode(result)
        except BaseException as e:  # SystemExit too; the test decides how to handle it
            if self.channel.closed:
                raise
            result, error = None, self._raised(e)
        finally:
            self.serving -= 1
        for place, value in enumerate(values):
            if mutable(value) and (data := self.codec.encode(value)) != sent[place]:
                changed.append([place, data])
        answer = ["result", result, error, changed]
        self.channel.send([*answer, text] if (text := self.note()) else answer)

    def _carry_out(self, operation: Any, target: Any, values: list[Any], named: Any) -> Any:
        if operation == "lookup" and self.lookup is not None:
            return self.lookup(target)
        if operation == "stdin" and self.trusted:
            return streams.read(*values)
        if operation == "print" and self.trusted:
            count = len(values) - len(named)
            return streams.show(*values[:count], **dict(zip(named, values[count:], strict=True)))
        # The candidate may use objects it received, not objects constructed in a message.
        if self.trusted and not (type(target) is list and target[0] == "yours"):
            raise TypeError("not an object of the test")
        where = self.codec.decode(target)
        count = len(values) - len(named)
        if self.trusted:
            self._check(operation, where, values[:count])
        keywords = dict(zip(named, values[count:], strict=True))
        return OPERATIONS[operation](where, *values[:count], **keywords)

    def _encode(self, values: list[Any]) -> list[Any]:
        """Encode the values; a mutable value that is passed several times is sent once."""
        sent: list[Any] = []
        for i, value in enumerate(values):
            if i and mutable(value):
                first = next(j for j, v in enumerate(values) if v is value)
                sent.append(["same", first] if first < i else self.codec.encode(value))
            else:
                sent.append(self.codec.encode(value))
        return sent

    def _check(self, operation: str, target: Any, arguments: list[Any]) -> None:
        """Raise if the candidate may not perform an operation on an object of the tester.

        It may call and iterate objects, and use the methods of files and of classes that the test defines.
        """
        if operation in ("call", "next", "iter"):
            return
        if operation == "getattr" and arguments == ["__class__"]:
            if self.codec.is_shared(type(target)):
                return
            raise AttributeError("private attributes of the test's objects cannot be used")
        texts = ("__name__", "__qualname__", "__doc__")  # which decorators copy
        if operation == "getattr" and arguments[0] in texts and type(target) is FunctionType:
            return
        file = type(target) in _FILES and operation in ("getattr", "enter", "exit")
        own = type(target).__module__ == TEST_MODULE and operation not in ("delattr", "dir")
        if not file and not own:
            kind = AttributeError if operation.endswith("attr") else TypeError
            raise kind("the object belongs to the test")
        if operation in ("getattr", "setattr") and (
            type(arguments[0]) is not str or arguments[0].startswith("_")
        ):
            raise AttributeError("private attributes of the test's objects cannot be used")

    def _describe(self, value: Any) -> Any:
        """Return what the other side needs to know about an object that it gets a proxy for."""
        if not (isinstance(value, type) and issubclass(value, BaseException)):
            return None
        own, base = exceptions.base_of(value)
        return ["exception", [[self.codec.keep(kind), kind.__name__] for kind in own], base]

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
            _, own, base = self._describe(type(error))
            return [own, base, arguments, self.codec.keep(error)]
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
        """Return a local class for a remote exception class, so that `except` matches it."""
        kind: Any = exceptions.find(*base)
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
