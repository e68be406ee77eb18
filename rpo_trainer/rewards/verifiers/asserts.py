"""The asserts verifier: Python code is run, in a process of its own, against the row's tests.

The code was written by a model: it is run only where the user has asked for that, with limits on
time, memory and files, without the network and without this process's environment (`sandbox.py`).
That holds off accidents. Somebody who attacks on purpose is held off by a container or a virtual
machine around the whole program, and by nothing less.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import RecipeError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required

SECONDS = 10  # of one response's code and all its tests
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_SANDBOX = Path(__file__).with_name("sandbox.py")
_RESULT_BYTES = 65536


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
    return lambda response: run_tests(f"{extract_code(response)}\n{setup}", tests)


def extract_code(response: str) -> str:
    """The Python code of a response."""
    fences = [code for name, code in _FENCE.findall(response) if name.lower() in _PYTHON]
    return "\n".join(fences) if fences else response


def run_tests(code: str, tests: list[str], seconds: int = SECONDS) -> float:
    """The share of tests that pass; those not reached within `seconds` have failed."""
    token = secrets.token_hex(16)  # what the code prints is not taken for a result
    task = json.dumps({"code": code, "tests": tests, "token": token, "seconds": seconds})
    with tempfile.TemporaryDirectory(prefix="rpo-asserts-") as folder:
        results = Path(folder) / "results"
        home = Path(folder) / "home"
        home.mkdir()
        with results.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_SANDBOX)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=home,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(home), "TMPDIR": str(home),
                     "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )  # fmt: skip
        try:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(task.encode(), timeout=seconds + 2)
        finally:
            if process.returncode is None:  # not waited for yet: the number is still its own
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with results.open("rb") as file:
            lines = file.read(_RESULT_BYTES).decode(errors="replace").splitlines()
    passed = {line for line in lines if line.startswith(token)}
    return sum(f"{token} {number}" in passed for number in range(len(tests))) / len(tests)


def require_permission(allowed: bool) -> None:
    """Raises RecipeError unless the user has asked for code to be run."""
    if not allowed:
        raise RecipeError(
            "the verifier 'asserts' runs code that a model has written",
            why="that code can do harm; it runs with limits, which are no wall",
            fix="allow_code_execution: true (--allow-code-execution), best inside a container",
        )


ASSERTS = Verifier("asserts", 1.0, ("tests", "setup"), _asserts)
