"""Start the candidate process and the tester process (see `__init__.py`).

Standard input has two messages: the code, then the tests. The candidate is forked after the first one is
read, so that its memory never contains the tests. It waits until the tester starts it. Standard output
gets `s`, then one byte per test; or `e` and a text for an error that the response did not cause.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any, NoReturn

from . import streams
from .limits import confine
from .names import Names, look_up
from .peer import Peer
from .proxies import RESPONSE_MODULE
from .wire import Channel


def main() -> NoReturn:
    """Run the task on standard input."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the processes exchange integers of any length
    task = Channel(0, -1, ahead=False)
    first = task.receive()
    to_candidate, to_tester = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            keep = (to_candidate[0], to_tester[1])
            _only(keep)
            _candidate(Channel(*keep), first)
        finally:
            os._exit(1)
    try:
        rest = task.receive()
        report = os.dup(1)
        keep = (to_tester[0], to_candidate[1])
        _only((*keep, report))
        _tester(Channel(*keep), report, rest, first)
    finally:
        os._exit(0)


def _only(keep: tuple[int, ...]) -> None:
    """Close all other descriptors; the standard ones are redirected to the null device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for descriptor in range(3, max(*keep, nowhere) + 1):
        if descriptor not in keep:
            try:
                os.close(descriptor)
            except OSError:
                continue


def _candidate(channel: Channel, task: dict[str, Any]) -> None:
    leave = os._exit
    confine(os.getcwd(), task["seconds"], candidate=True)
    module = ModuleType(RESPONSE_MODULE)
    sys.modules[RESPONSE_MODULE] = module
    namespace = module.__dict__
    peer = Peer(channel, trusted=False)
    peer.lookup = lambda name: look_up(namespace, name)
    peer.codec.shared, peer.codec.names = frozenset(task["classes"]), namespace
    output = streams.connect(peer.ask, lambda: peer.serving > 0)
    if channel.receive() != "start":
        leave(1)
    try:
        for statement in task["setup"]:
            # Definitions that require other parts of `setup` are skipped.
            with contextlib.suppress(Exception):
                exec(compile(statement, "setup", "exec", dont_inherit=True), namespace)
        exec(compile(task["code"], "response", "exec", dont_inherit=True), namespace)
    except BaseException:
        leave(1)
    output.take()
    peer.note, peer.read_note = output.take, output.note
    channel.send("ready")
    while True:
        peer.serve(channel.receive())


def _tester(channel: Channel, report: int, task: dict[str, Any], first: dict[str, Any]) -> None:
    confine(os.getcwd(), first["seconds"], candidate=False)
    peer = Peer(channel, trusted=True)
    peer.note, peer.read_note = streams.note, lambda text: text and sys.stdout.write(text)
    tests, setup = task["tests"], task["setup"]
    peer.stops = any(
        word in text for text in (setup, *tests) for word in ("StopIteration", ".send(", ".throw(")
    )
    names = Names(peer, "\n".join((setup, *tests)))
    peer.codec.shared, peer.codec.names = frozenset(first["classes"]), names
    if fault := _import(setup, tests, names):
        os.write(report, b"e" + fault.encode(errors="replace"))
        return

    def start() -> None:
        """Run the code of the response, which has not run before."""
        names.start = None
        os.write(report, b"s")
        channel.send("start")
        if channel.receive() != "ready":
            channel.closed = True

    names.start = start
    try:
        exec(compile(setup, "setup", "exec", dont_inherit=True), names)
    except BaseException as error:
        if names.start is not None:  # no object of the response was requested yet
            os.write(report, b"e" + _text("setup", error).encode(errors="replace"))
        return
    if names.start is not None:
        start()
    names.take_tested_builtin(tests)
    for test in tests:
        passed = False
        if not channel.closed:
            try:
                exec(compile(test, "test", "exec", dont_inherit=True), names)
                passed = True
            except BaseException:  # SystemExit too
                passed = False
        # A test may mistake the exit of the response for an expected exception.
        os.write(report, b"1" if passed and not channel.closed else b"0")


def _import(setup: str, tests: list[str], names: dict[str, Any]) -> str:
    """Run the imports of `setup`; return an error for modules missing there or in the tests."""
    for node in ast.parse(setup).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            try:
                exec(compile(ast.Module([node], []), "setup", "exec", dont_inherit=True), names)
            except Exception as error:
                return _text("setup", error)
    for test in tests:
        if "import" not in test or "sys." in test:  # for example a module that the test creates
            continue
        for node in ast.parse(test).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in {module.split(".")[0] for module in modules}:
                if module not in sys.modules and importlib.util.find_spec(module) is None:
                    return f"`tests` import {module!r}, which is not installed"
    return ""


def _text(where: str, error: BaseException) -> str:
    return f"`{where}` fails ({type(error).__name__}: {str(error)[:200]})"
