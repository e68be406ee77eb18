"""Code runs within its limits, and cannot report its own result."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.errors import DataError, RunError
from rpo_trainer.rewards.verifiers import asserts, get_verifier
from rpo_trainer.rewards.verifiers.asserts import extract_code, run_tests
from tests.raising import raises
from tests.rewards.failing import unverifiable

GOOD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]


def reward(response: str, **columns: Any) -> float:
    verifier = get_verifier("asserts", allow_code_execution=True)
    return verifier(response, {"tests": TESTS, **columns})


def test_the_reward_is_the_share_of_tests_that_pass() -> None:
    assert reward(f"Here you are:\n```python\n{GOOD}```\nDone.") == 1.0
    assert reward(GOOD) == 1.0  # no fence: all of it is code
    assert reward("def add(a, b):\n    return 0") == pytest.approx(2 / 3)
    assert reward("def add(a, b)") == 0.0
    assert reward("") == 0.0
    assert reward("def add(a, b):\n    return base + a + b", setup="base = 0") == 1.0


def test_code_of_a_response() -> None:
    assert extract_code("a\n```py\nx\n```\nb\n```\ny\n```\n```json\nz\n```") == "x\n\ny\n"
    assert extract_code("  ```python\n  x\n  ```") == "  x\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "print('0'); print('passed 0'); raise SystemExit",
        f"{GOOD}\nimport atexit; atexit.register(print, 0)\nraise ValueError",
    ],
)
def test_leaving_early_passes_nothing(code: str) -> None:
    assert run_tests(code, TESTS) == 0.0


def test_a_test_that_leaves_does_not_take_the_others_with_it() -> None:
    assert run_tests("import sys", ["sys.exit(0)", "assert True"]) == 0.5


def test_time_is_limited_and_nothing_is_left_running() -> None:
    start = time.monotonic()
    assert run_tests("import time\nwhile True: pass", TESTS, seconds=1) == 0.0
    assert run_tests(GOOD + "import time", [TESTS[0], "time.sleep(60)"], seconds=1) == 0.5
    assert time.monotonic() - start < 10


def test_memory_and_files_are_limited() -> None:
    assert run_tests("x = bytearray(4 << 30)", ["assert True"]) == 0.0
    big = "open('big', 'wb').write(b'x' * (8 << 20))"
    assert run_tests("", [big, "assert True"]) <= 0.5


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w').write('x')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'mine')",
        "import os; os.symlink('a', {path!r} + '2')",
        "import shutil; shutil.rmtree({path!r})",
        "import os; os.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
    ],
)
def test_files_outside_are_left_alone(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("keep")
    assert run_tests("", [attempt.format(path=str(file))]) == 0.0
    assert file.read_text() == "keep"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_its_own_folder_is_its_own_and_goes_away() -> None:
    code = "import os, pathlib\npathlib.Path('a').write_text('x')\nplace = os.getcwd()"
    assert run_tests(code, ["assert open('a').read() == 'x'", "assert 'rpo-asserts' in place"]) == 1


@pytest.mark.parametrize(
    "attempt",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
    ],
)
def test_no_other_processes(attempt: str) -> None:
    assert run_tests("", [attempt, "assert True"]) == 0.5


def test_no_network() -> None:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        attempts = [
            f"import urllib.request as u; u.urlopen({url!r}, timeout=2)",
            f"import socket; socket.create_connection(('127.0.0.1', {server.server_port}), 2)",
        ]
        assert run_tests("", attempts) == 0.0
    finally:
        server.shutdown()
    assert seen == []


def test_no_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tests = ["assert 'OPENAI_API_KEY' not in os.environ", "assert 'secret' not in str(os.environ)"]
    assert run_tests("import os", tests) == 1.0
    assert os.environ["OPENAI_API_KEY"] == "secret"


@pytest.mark.parametrize("tests", [[], "assert True", [1]])
def test_tests_that_are_none(tests: Any) -> None:
    with unverifiable("verifier.bad-column", "`tests`"):
        get_verifier("asserts", allow_code_execution=True).prepare({"tests": tests})
    with unverifiable("verifier.bad-column", "`setup`"):
        get_verifier("asserts", allow_code_execution=True).prepare({"tests": TESTS, "setup": 1})


@pytest.mark.parametrize(
    "columns",
    [{"setup": "def ("}, {"tests": ["assert add(1, 2) == 3", "assert f( == 1"]}, {"setup": "\0"},
     {"tests": ["return 1"]}, {"tests": ["-" * 100_000 + "1"]}],
)  # fmt: skip
def test_code_of_a_row_that_does_not_compile(columns: dict[str, Any]) -> None:
    with unverifiable("verifier.invalid-python", *(f"`{name}`" for name in columns)):
        get_verifier("asserts", allow_code_execution=True).prepare({"tests": TESTS, **columns})


@pytest.mark.parametrize(
    "columns",
    [{"setup": "import notinstalled_lib"}, {"setup": "from json import no_such_name"},
     {"tests": ["import notinstalled_lib\nassert add(1, 2) == 3"]}, {"setup": "base = 1 / 0"},
     {"tests": ["from notinstalled_lib.a import b", "assert True"]}, {"setup": "raise SystemExit"}],
)  # fmt: skip
def test_a_fault_of_the_row_or_the_installation_is_an_error(columns: dict[str, Any]) -> None:
    with raises("verifier.setup-failed", DataError):
        reward(GOOD, **columns)


def test_a_setup_that_fails_for_want_of_the_response_gives_0() -> None:
    setup = "root = Node(1)\nroot.left = Node(2)"
    assert reward(GOOD, setup=setup) == 0.0
    assert reward("class Node:\n    def __init__(self, v): 1 / 0", setup=setup) == 0.0
    node = "class Node:\n    def __init__(self, v): self.v = v\n"
    assert reward(GOOD + node, setup=setup, tests=["assert root.left.v == 2"]) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("sys.executable", "/absent/python"), ("sys.executable", "/"), ("tempfile.tempdir", "/absent"),
     (f"{asserts.__name__}._START", "raise SystemExit(3)"),
     (f"{asserts.__name__}._START", "import time; time.sleep(60)")],
)  # fmt: skip
def test_a_sandbox_that_does_not_start_is_an_error(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, value)
    monkeypatch.setattr(asserts, "SECONDS", 1)
    with raises("verifier.sandbox-failed", RunError):
        reward(GOOD)


def test_no_directory_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for code in (
        "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')",
        "import os\nfor i in range(30): os.mkdir('d' * 250); os.chdir('d' * 250)",
        "import os\nos.makedirs('a/b/c'); open('a/b/f', 'w'); os.symlink('/', 'a/l')\n"
        "os.mkfifo = None; os.chmod('a/b', 0)",
    ):
        assert run_tests(code, ["assert True"]) in (0.0, 1.0)
        assert list(tmp_path.iterdir()) == []
    deep = tmp_path / "home"
    deep.mkdir()
    here = os.open(deep, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    asserts._remove(str(deep))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_reference_solutions_pass_their_own_asserts(shared_dir: Path) -> None:
    verifier = get_verifier("asserts", allow_code_execution=True)
    with (shared_dir / "data" / "dev" / "code_sft_mbpp.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    with ThreadPoolExecutor(2) as pool:
        rewards = list(pool.map(lambda r: verifier(r["messages"][-1]["content"], r), rows))
    failed = [row["id"] for row, got in zip(rows, rewards, strict=True) if got != 1.0]
    assert len(rows) == 783
    assert failed == []
