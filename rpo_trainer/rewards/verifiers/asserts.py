"""The asserts verifier: a response's code is run against the row's tests, outside of this process.

The code and the tests run in two processes (`sandbox/`). The process of the code knows neither the
tests nor what they expect, and has no way to report a result. Both processes have limits on time,
memory, files, and other processes, and have no network and none of this process's environment.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import RecipeError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required

SECONDS = 10  # of one response's code and all its tests
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_SANDBOX = Path(__file__).with_name("sandbox")
# The folder is a package of its own there, so that nothing else of this one is imported.
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from sandbox.main import main; "
    "del sys.path[0], sys.argv[1:]; main()"
)


def _asserts(row: Row) -> Check:
    """The share of the row's `tests` that pass: 1 where all do, 0 where the code does not run.

    `tests` is a list of statements (asserts), each run by itself behind the response's code (that
    of its Python fences, or all of it where it has none) and the row's `setup`, as in MBPP.
    """
    tests = required(row, "tests")
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise RowError("`tests` is not a list of statements")
    setup = row.get("setup") or ""
    if not isinstance(setup, str):
        raise RowError("`setup` is not text")
    return lambda response: run_tests(extract_code(response), tests, setup=setup)


def extract_code(response: str) -> str:
    """The Python code of a response."""
    fences = [code for name, code in _FENCE.findall(response) if name.lower() in _PYTHON]
    return "\n".join(fences) if fences else response


def run_tests(code: str, tests: list[str], seconds: int = SECONDS, setup: str = "") -> float:
    """The share of tests that pass; those not reached within `seconds` have failed."""
    first = {"code": f"{code}\n{setup}", "seconds": seconds}
    task = b"".join(_frame(part) for part in (first, {"tests": tests, "setup": setup}))
    with tempfile.TemporaryDirectory(prefix="rpo-asserts-", ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, str(_SANDBOX.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home,
                 "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        try:
            results = _exchange(process, task, time.monotonic() + seconds + 2)
        finally:
            # Before the leader of the group is waited for: until then its number stays its own.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
    return results[: len(tests)].count(b"1") / len(tests)


def _frame(part: dict[str, Any]) -> bytes:
    data = json.dumps(part).encode()
    return struct.pack("=Q", len(data)) + data


def _exchange(process: subprocess.Popen[bytes], task: bytes, deadline: float) -> bytes:
    """Writes the task and reads the results, until the tester closes its end or time is up."""
    assert process.stdin is not None and process.stdout is not None
    target, source = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(target, False)
    results = bytearray()
    rest = memoryview(task)
    with selectors.DefaultSelector() as ready:
        ready.register(source, selectors.EVENT_READ)
        ready.register(target, selectors.EVENT_WRITE)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                if key.fd == source:
                    part = os.read(source, 65536)
                    if not part:
                        return bytes(results)
                    results += part
                    continue
                try:
                    rest = rest[os.write(target, rest) :]
                except BrokenPipeError:  # the sandbox has ended before it has read everything
                    rest = rest[:0]
                if not rest:
                    ready.unregister(target)
    return bytes(results)


def require_permission(allowed: bool) -> None:
    """Raises RecipeError unless the user has asked for code to be run."""
    if not allowed:
        raise RecipeError(
            "the verifier 'asserts' runs code that a model has written",
            why="that code can do harm; it runs with limits, which are no wall",
            fix="allow_code_execution: true (--allow-code-execution), best inside a container",
        )


ASSERTS = Verifier("asserts", 1.0, ("tests", "setup"), _asserts)
