"""Starts the candidate process and the tester process (see `__init__.py`).

Standard input holds two messages: the code, then the tests. The candidate is forked when only the
first has been read, so nothing of the tests is ever in its memory. Standard output gets one byte
for each test.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
from collections.abc import Container
from types import FunctionType
from typing import Any, NoReturn

from .limits import confine
from .proxies import TEST_MODULE, Peer
from .wire import Channel

# Modules without state that a test may use although only the response imports them. They come from
# the tester's own library: a response's `math.isclose` doesn't decide a test.
_PURE = {
    "cmath", "collections", "functools", "itertools", "math", "np", "numpy", "operator", "re",
    "unittest",
}  # fmt: skip
# The same, except that a response may well have a function of that name.
_PURE_OR_FUNCTION = {
    "bisect", "copy", "datetime", "decimal", "fractions", "json", "numbers", "statistics", "string",
    "typing",
}  # fmt: skip


def main() -> NoReturn:
    """Runs the task on standard input."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # integers of any length travel between the processes
    task = Channel(0, -1, ahead=False)
    first = task.receive()
    to_candidate, to_tester = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            keep = (to_candidate[0], to_tester[1])
            _only(keep)
            _candidate(Channel(*keep), first["code"], first["seconds"])
        finally:
            os._exit(1)
    try:
        rest = task.receive()
        report = os.dup(1)
        keep = (to_tester[0], to_candidate[1])
        _only((*keep, report))
        _tester(Channel(*keep), report, rest, first["seconds"])
    finally:
        os._exit(0)


def _only(keep: tuple[int, ...]) -> None:
    """Closes all other descriptors; the standard ones lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for descriptor in range(3, max(*keep, nowhere) + 1):
        if descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError:
                continue


def _candidate(channel: Channel, code: str, seconds: int) -> None:
    leave = os._exit
    confine(os.getcwd(), seconds, candidate=True)
    namespace: dict[str, Any] = {"__name__": "__response__"}
    peer = Peer(channel, trusted=False)

    def lookup(name: str) -> Any:
        if name in namespace:
            value = namespace[name]
            return [value, type(value) is FunctionType]
        return []

    peer.lookup = lookup
    try:
        exec(compile(code, "response", "exec"), namespace)
    except BaseException:
        leave(1)
    channel.send("ready")
    while True:
        peer.serve(channel.receive())


class _Names(dict[str, Any]):
    """The namespace of the tests: what it lacks is looked up in the response."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(__name__=TEST_MODULE, __builtins__=builtins)
        self._peer = peer

    def __missing__(self, name: str) -> Any:
        if name in builtins.__dict__ or name.startswith("__"):
            raise KeyError(name)
        found = self._peer.ask("lookup", name, (), {})
        if type(found) is not list or len(found) != 2:
            raise KeyError(name)
        if name in _PURE or (name in _PURE_OR_FUNCTION and found[1] is not True):
            self[name] = importlib.import_module("numpy" if name == "np" else name)
            return self[name]
        if found[1] is True:  # a function keeps its name: one request is enough
            self[name] = found[0]
        return found[0]

    def take_function(self, name: str) -> None:
        """Resolves a name in the response, where it is a function there, before the builtins."""
        found = self._peer.ask("lookup", name, (), {})
        if type(found) is list and len(found) == 2 and found[1] is True:
            self[name] = found[0]


def _tester(channel: Channel, report: int, task: dict[str, Any], seconds: int) -> None:
    confine(os.getcwd(), seconds, candidate=False)
    if channel.receive() != "ready":
        return
    names = _Names(Peer(channel, trusted=True))
    for statement in _imports(task["setup"]):
        exec(statement, names)
    for name in _tested_builtins(task["tests"], names):
        names.take_function(name)
    gone = False
    for test in task["tests"]:
        passed = False
        if not gone:
            try:
                exec(compile(test, "test", "exec", dont_inherit=True), names)
                passed = True
            except BaseException as e:  # SystemExit too
                gone = isinstance(e, (BrokenPipeError, EOFError)) and channel.closed
        os.write(report, b"1" if passed else b"0")


def _tested_builtins(tests: list[str], known: Container[str]) -> set[str]:
    """Builtin names that the tests are about, as where a task asks for a function `sum`.

    Only where the tests use no other name of the response: else a response could replace `abs` and
    with it the comparison.
    """
    loaded: set[str] = set()
    stored: set[str] = set()
    for test in tests:
        try:
            nodes = list(ast.walk(ast.parse(test)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # that test fails by itself
        for node in nodes:
            if isinstance(node, ast.Name):
                (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
            elif isinstance(node, ast.arg):
                stored.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                stored.add(node.name)
            elif isinstance(node, ast.alias):
                stored.add(node.asname or node.name)
    others = {name for name in loaded - stored if name not in known and not hasattr(builtins, name)}
    if others - _PURE - _PURE_OR_FUNCTION:
        return set()
    return {name for name in loaded - stored if name in builtins.__dict__}


def _imports(setup: str) -> list[Any]:
    """The top-level import statements of `setup`, compiled."""
    return [
        compile(ast.Module([node], []), "setup", "exec")
        for node in ast.parse(setup).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
