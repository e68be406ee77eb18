"""The `asserts` verifier: run the code of a response against the tests of the row, in other processes.

Code and tests run in two processes (`sandbox/`). The process of the code has neither the tests nor the
expected values, and cannot report a result. Both processes have limits on time, memory, files and
subprocesses, and no access to the network or to this process's environment.
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
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import DataError, RunError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required
from rpo_trainer.rewards.verifiers.setup_code import Setup

SECONDS = 10  # for the code of one response and all its tests
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_SANDBOX = Path(__file__).with_name("sandbox")
# `sandbox` is imported as a top-level package, so that nothing else of this package is imported.
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from sandbox.main import main; "
    "del sys.path[0], sys.argv[1:]; main()"
)


def _asserts(row: Row) -> Check:
    """Return the fraction of the row's `tests` that pass: 1 if all do, 0 if the code does not run.

    `tests` is a list of statements (asserts). Each runs separately after the code of the response (its Python
    fences, or all of it without fences) and the row's `setup`, as in MBPP.
    """
    require_sandbox()
    tests = required(row, "tests")
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise RowError("`tests` is not a list of statements", code="verifier.bad-column")
    source = row.get("setup") or ""
    if not isinstance(source, str):
        raise RowError("`setup` is not text", code="verifier.bad-column")
    for what, code in (("setup", source), *(("tests", test) for test in tests)):
        _compile(what, code)
    setup = Setup(source, tests)
    return lambda response: _run(extract_code(response), tests, SECONDS, setup)


def require_sandbox() -> None:
    """Raise RunError on systems without the limits that the sandbox sets on untrusted code."""
    missing = [f"os.{name}" for name in ("fork", "killpg") if not hasattr(os, name)]
    try:
        import resource  # noqa: F401
    except ModuleNotFoundError:
        missing.append("resource")
    if missing:
        raise RunError(
            f"the sandbox cannot run on this system: Python has no {', '.join(missing)}",
            code="verifier.unsupported-system",
            where="the verifier 'asserts'",
            why="code of responses would run without limits on time, memory and files",
            fix="use Linux or macOS (on Windows: WSL), or another verifier",
        )


def _compile(what: str, code: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "\d" in a text
            compile(code, what, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error) or "nested too deeply"
        raise RowError(
            f"`{what}` is not Python ({type(error).__name__}: {reason})",
            code="verifier.invalid-python",
        ) from None


def extract_code(response: str) -> str:
    """Return the Python code of a response."""
    fences = [code for name, code in _FENCE.findall(response) if name.lower() in _PYTHON]
    return "\n".join(fences) if fences else response


def run_tests(code: str, tests: list[str], seconds: int = SECONDS, setup: str = "") -> float:
    """Return the fraction of tests that pass; tests not reached within `seconds` fail.

    Raises:
        DataError: `setup` fails, or it or the tests import a module that is not installed.
        RunError: the sandbox does not start.
    """
    return _run(code, tests, seconds, Setup(setup, tests))


def _run(code: str, tests: list[str], seconds: int, setup: Setup) -> float:
    shared = setup.shared_with(code)
    first = {"code": code, "seconds": seconds, "setup": shared.statements,
             "classes": shared.classes}  # fmt: skip
    task = b"".join(_frame(part) for part in (first, {"tests": tests, "setup": setup.source}))
    try:
        home = tempfile.mkdtemp(prefix="rpo-asserts-")
    except OSError as error:
        raise _not_started(f"no temporary directory: {error.strerror}") from error
    try:
        results, status = _start(home, task, seconds)
    finally:
        _remove(home)
    kind, verdicts = results[:1], results[1:]
    if kind == b"e":
        raise DataError(
            verdicts.decode(errors="replace"),
            code="verifier.setup-failed",
            where="the verifier 'asserts'",
            why="it fails for every response",
            fix="install the missing module, or correct or remove the rows",
        )
    if kind != b"s":
        raise _not_started(
            f"no result within {seconds + 2} s" if status is None else f"exit status {status}"
        )
    return verdicts[: len(tests)].count(b"1") / len(tests)


def _not_started(reason: str) -> RunError:
    return RunError(
        f"the sandbox does not start ({reason})",
        code="verifier.sandbox-failed",
        where="the verifier 'asserts'",
        why="without it every response would get the reward 0",
        fix=f"check that {sys.executable} starts and {tempfile.gettempdir()} is writable"
        if os.path.isdir(tempfile.tempdir or "")
        else "set TMPDIR to a writable directory",
    )


def _start(home: str, task: bytes, seconds: int) -> tuple[bytes, int | None]:
    """Run the sandbox in `home`; return its output, and its exit status if it exited on its own."""
    try:
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
    except OSError as error:
        raise _not_started(f"{error.strerror}: {error.filename or sys.executable}") from error
    try:
        results, ended = _exchange(process, task, time.monotonic() + seconds + 2)
        if ended and not results:
            with suppress(subprocess.TimeoutExpired):
                return results, process.wait(timeout=2)
        return results, None
    finally:
        # Before waiting for the group leader: until then its process id is not reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _remove(home: str) -> None:
    """Delete a directory of any depth: subdirectories are moved up before they are deleted."""
    rest, count = [home], 0
    while rest:
        place = rest.pop()
        with suppress(OSError):
            os.chmod(place, 0o700)
        try:
            entries = list(os.scandir(place))
        except OSError:
            continue
        for entry in entries:
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                if place != home:
                    count += 1
                    moved = os.path.join(home, f"{count}.moved")
                    os.rename(entry.path, moved)
                rest.append(moved if place != home else entry.path)
        if place != home:
            with suppress(OSError):
                os.rmdir(place)
    with suppress(OSError):
        os.rmdir(home)


def _frame(part: dict[str, Any]) -> bytes:
    data = json.dumps(part).encode()
    return struct.pack("=Q", len(data)) + data


def _exchange(process: subprocess.Popen[bytes], task: bytes, deadline: float) -> tuple[bytes, bool]:
    """Write the task and read the results until the tester closes its end or the deadline passes.

    Returns:
        The results, and whether the tester closed its end.
    """
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
                        return bytes(results), True
                    results += part
                    continue
                try:
                    rest = rest[os.write(target, rest) :]
                except BrokenPipeError:  # the sandbox exited before it read everything
                    rest = rest[:0]
                if not rest:
                    ready.unregister(target)
    return bytes(results), False


ASSERTS = Verifier("asserts", 1.0, ("tests", "setup"), _asserts, runs_code=True)
