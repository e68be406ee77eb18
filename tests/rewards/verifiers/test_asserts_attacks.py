"""A response cannot award itself a reward, and cannot change anything outside its working directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rpo_trainer.rewards.verifiers.asserts import run_tests
from rpo_trainer.rewards.verifiers.sandbox.limits import landlock_version

WRONG = "def f(x):\n    return 0\n"
UNMET = ["assert f(1) == 5", "assert 5 == f(1)", "assert f(1) in (5, 6)", "assert [f(1)] == [5]"]
LIAR = (
    "class Liar{base}:\n"
    "    __eq__ = lambda self, other: True\n"
    "    __ne__ = lambda self, other: False\n"
    "    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True\n"
    "    __sub__ = __rsub__ = __add__ = __radd__ = __xor__ = lambda self, other: 0\n"
    "    __abs__ = lambda self: 0\n"
    "    __hash__ = lambda self: hash(5)\n"
    "def f(x):\n    return Liar()\n"
)
WRITE_EVERYWHERE = (
    "import os\n"
    "for fd in range(64):\n"
    "    for text in (b'1' * 8, b'\\x04' + b'\\0' * 7 + b'true', b'1\\n'):\n"
    "        try:\n            os.write(fd, text)\n"
    "        except OSError:\n            pass\n"
)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "import sys\nframe = sys._getframe()\n"
            "while frame:\n"
            "    for value in list(frame.f_locals.values()):\n"
            "        if type(value) is int and value > 2:\n"
            "            try: __import__('os').write(value, b'1' * 9)\n"
            "            except OSError: pass\n"
            "    frame = frame.f_back\n__import__('os')._exit(0)",
            id="frames",
        ),
        pytest.param(
            "import gc, os\n"
            "found = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]\n"
            "texts = [o for o in gc.get_objects() if 'assert f(1)' in str(o)[:99999]]\n"
            "expected = 5 if found else 0\n"
            "def f(x):\n    return expected",
            id="gc",
        ),
        pytest.param(WRITE_EVERYWHERE + "os._exit(0)", id="descriptors"),
        pytest.param(WRITE_EVERYWHERE + WRONG, id="descriptors, then a function"),
        pytest.param("def f(x):\n" + "".join(f"    {line}\n" for line in
                     WRITE_EVERYWHERE.splitlines()), id="descriptors in a call"),
        pytest.param("import os\ndef f(x):\n    os._exit(0)", id="leaves in a call"),
        pytest.param(LIAR.format(base=""), id="equals everything"),
        pytest.param(LIAR.format(base="(int)"), id="an integer that equals everything"),
        pytest.param(
            "import builtins\n"
            "builtins.AssertionError = type('A', (BaseException,), {})\n"
            "builtins.isinstance = builtins.len = builtins.compile = lambda *a, **k: True\n"
            "builtins.exec = builtins.abs = builtins.any = lambda *a, **k: 5 - 5\n" + WRONG,
            id="patched builtins",
        ),
        pytest.param(
            "def abs(x):\n    return 0\ndef len(x):\n    return 5\n"
            "class math:\n    isclose = lambda *a, **k: True\n" + WRONG,
            id="own builtins and modules",
        ),
        pytest.param(
            "import sys\ndef trace(frame, event, arg):\n"
            "    frame.f_locals.clear() if event == 'exception' else None\n    return trace\n"
            "sys.settrace(trace)\nsys.setprofile(trace)\n" + WRONG,
            id="settrace",
        ),
        pytest.param("import atexit, os\natexit.register(os._exit, 0)\n" + WRONG, id="atexit"),
        pytest.param(
            "import os\n"
            "for name in ('fd', 'task'):\n"
            "    for entry in os.listdir('/proc/self/' + name):\n"
            "        try: open(f'/proc/self/{name}/{entry}', 'rb').read1(10)\n"
            "        except Exception: pass\n"
            "expected = 0\n"
            "for where in ('fd/0', 'mem', 'environ', 'cmdline'):\n"
            "    try: text = open(f'/proc/{os.getppid()}/{where}', 'rb').read(1 << 16)\n"
            "    except OSError: continue\n"
            "    expected = 5 if b'assert f(1)' in text else expected\n"
            "def f(x):\n    return expected",
            id="proc",
        ),
        pytest.param(
            "import sys\n"
            "for module in list(sys.modules.values()):\n"
            "    for name in ('loads', 'dumps', '_plain', '_value', 'update', 'mutable'):\n"
            "        if hasattr(module, name): setattr(module, name, lambda *a, **k: True)\n" + WRONG,
            id="patched modules",
        ),
        pytest.param(
            "import sys\n"
            "sys.modules['sandbox.proxies']._OPERATIONS['value'] = lambda o: o\n"
            + LIAR.format(base="(int)"),
            id="patched server",
        ),
    ],
)  # fmt: skip
def test_a_response_cannot_award_itself(code: str) -> None:
    tests = [*UNMET, "assert abs(f(1) - 3.14) < 1e-6", "assert 2 < f(1) < 4", "assert len('a') == 5",
             "assert math.isclose(f(1), 2.5)"]  # fmt: skip
    assert run_tests(code, tests, setup="import math") == 0.0


def test_a_module_of_the_response_does_not_decide_a_test() -> None:
    fake = "class math:\n    isclose = lambda *a, **k: True\n"
    assert run_tests(fake, ["assert math.isclose(1, 2)"]) == 0.0
    assert run_tests("import math", ["assert math.isclose(1, 1)"]) == 1.0


@pytest.mark.parametrize(
    "zero", ["0", "0.0", "set()", "[]", "self", "__import__('decimal').Decimal()"]
)
def test_arithmetic_with_the_expected_value_does_not_decide_a_test(zero: str) -> None:
    code = (
        "class Liar:\n"
        f"    def __sub__(self, other): return {zero}\n"
        "    __rsub__ = __xor__ = __rxor__ = __sub__\n"
        "    def __abs__(self): return 0.0\n"
        "    def __bool__(self): return False\n"
        "    def __len__(self): return 0\n"
        "def f(x): return Liar()\n"
    )
    tests = ["assert abs(f(1) - 3.14) < 1e-6", "assert abs(3.14 - f(1)) < 1e-6", "assert not f(1) - 3",
             "assert not f(1) - {3}", "assert not f(1) ^ 5", "assert len(f(1) - {1}) == 0"]  # fmt: skip
    assert run_tests(code, tests) == 0.0


def test_a_callback_gives_no_way_into_the_tester() -> None:
    code = (
        "found = []\n"
        "def f(g):\n"
        "    for name in ('__globals__', '__code__', '__closure__', '__self__', 'gi_frame'):\n"
        "        try: found.append(getattr(g, name))\n"
        "        except AttributeError: pass\n"
        "    return len(found)\n"
    )
    tests = [
        "assert f(lambda: 5) == 0",
        "assert f(x for x in 'a') == 0",
        "assert f([].append) == 0",
    ]
    assert run_tests(code, tests) == 1.0


def test_answers_that_are_not_messages_fail_the_test() -> None:
    code = (
        "import gc, sys\n"
        "Channel = sys.modules['sandbox.wire'].Channel\n"
        "def f(x):\n"
        "    for o in gc.get_objects():\n"
        "        if type(o) is Channel: o.send({message})\n"
        "    return 0\n"
    )
    for message in ("['result', ['own', -1, None], None, []]", "['result']", "5", "[['x']]",
                    "['result', ['pickle', 'cos\\nsystem\\n.'], None, []]",
                    "['call', ['builtin', 'exit'], [], {}]", "['lookup', 'f', [], {}]",
                    "['result', ['array', '|O', [1], '12345678', False], None, []]"):  # fmt: skip
        assert run_tests(code.replace("{message}", message), UNMET) == 0.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this test's sandboxes: other tests run some at the same time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_threads_and_sleepers_do_not_outlive_the_verdict(home: Path) -> None:
    code = (
        "import os, signal, threading, time\n"
        "try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "except RuntimeError: pass\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "for leave in ('setsid', 'setpgrp'):\n"
        "    getattr(os, leave, lambda: None)()\n"
        "def f(x):\n    time.sleep(60)\n"
    )
    start = time.monotonic()
    seen: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(run_tests, code, ["f(1)"], seconds=1)
        while not verdict.done():
            seen |= _processes(home)
            time.sleep(0.05)
    assert verdict.result() == 0.0 and (seen or not os.path.isdir("/proc"))
    assert time.monotonic() - start < 8
    deadline = time.monotonic() + 5
    while _processes(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes(home)


def test_no_process_outlives_the_verdict_however_it_is_started(home: Path) -> None:
    code = (
        "import os, sys, threading, time\n"
        "sys.modules.pop('_posixsubprocess', None)\n"
        "import _posixsubprocess\n"
        "def before():\n"
        "    try:\n"
        "        del sys.modules['posix']\n"
        "        import posix\n"
        "        posix.setsid()\n"
        "    except Exception: pass\n"
        "    time.sleep(30)\n"
        "r, w = os.pipe()\n"
        "call = [[b'x'], [b'/absent'], True, (), None, None, -1, -1, -1, -1, -1, -1, r, w, False, False,\n"
        "        -1, None, None, None, -1, before]\n"
        "if sys.version_info >= (3, 11): call.append(False)\n"
        "threading.Thread(target=_posixsubprocess.fork_exec, args=call, daemon=True).start()\n"
        "time.sleep(0.3)\n"
    )
    run_tests(code, ["assert True"], seconds=3)
    time.sleep(0.1)
    assert not _processes(home)


def _processes(home: Path) -> set[str]:
    """The processes of the sandboxes below a directory, which is in their initial environment."""
    found = set()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                if str(home).encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    found.add(entry)
            except OSError:
                continue
    return found


OUTSIDE = {
    "os.open with dir_fd": "os.open('b', os.O_CREAT | os.O_WRONLY, dir_fd=os.open('OUT', os.O_RDONLY))",
    "os.open with ..": "os.open('OUT/d/../b', os.O_CREAT | os.O_WRONLY)",
    "os.remove with dir_fd": "os.remove('victim', dir_fd=os.open('OUT', os.O_RDONLY))",
    "os.rename with dir_fd": "os.rename('victim', 'mine', src_dir_fd=os.open('OUT', os.O_RDONLY))",
    "os.replace": "os.replace('OUT/victim', 'mine')",
    "os.mkdir": "os.mkdir('OUT/new')",
    "os.rmdir": "os.rmdir('OUT/d')",
    "os.chmod": "os.chmod('OUT/victim', 0o777)",
    "os.utime": "os.utime('OUT/victim', (1, 1))",
    "os.truncate": "os.truncate('OUT/victim', 0)",
    "hard link": "os.link('OUT/victim', 'v')\nopen('v', 'w').write('changed')",
    "symbolic link": "os.symlink('OUT/victim', 'v')\nopen('v', 'w').write('changed')",
    "os.mkfifo": "os.mkfifo('OUT/f')",
    "os.mknod": "os.mknod('OUT/f')",
    "posix.mkfifo": "import posix\nposix.mkfifo('OUT/f')",
    "sqlite3": "import sqlite3\nsqlite3.connect('OUT/s.db').execute('create table t(a)')",
    "dbm": "import dbm.dumb\ndbm.dumb.open('OUT/db', 'n')['a'] = 'b'",
    "shutil": "import shutil\nshutil.copy('/etc/hostname', 'OUT/c')",
    "ctypes": "import ctypes\nctypes.CDLL(None).unlink(b'OUT/victim')",
    "chdir": "os.chdir('OUT')\nopen('b', 'w').write('x')",
    "mmap": "import mmap\nf = open('OUT/victim', 'r+b')\nmmap.mmap(f.fileno(), 0)[0] = 65",
    "logging": "import logging\nlogging.FileHandler('OUT/log').emit(logging.makeLogRecord({}))",
}


@pytest.mark.parametrize("where", ["response", "test"])
@pytest.mark.parametrize("how", OUTSIDE)
def test_nothing_outside_changes(how: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("x")
    before = victim.stat()
    code = "import os\n" + OUTSIDE[how].replace("OUT", str(tmp_path))
    if where == "response":
        assert run_tests(code, ["assert True"]) == 0.0
    else:
        assert run_tests("", [code]) == 0.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "victim"]
    assert victim.read_text() == "x"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize(
    "attempt",
    [
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.killpg(0, 0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.setsid()",
        "import _posixsubprocess; _posixsubprocess.fork_exec()",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None).getpid()",
    ],
)
def test_other_processes_cannot_be_reached(attempt: str) -> None:
    assert run_tests(attempt, ["assert True"]) == 0.0
    assert run_tests("", [attempt]) == 0.0


@pytest.mark.skipif(not landlock_version(), reason="the kernel has no Landlock")
def test_the_kernel_refuses_when_the_audit_hook_is_not_asked(tmp_path: Path) -> None:
    # In a separate process: Landlock cannot be removed again.
    script = (
        "import os, socket, sys, threading\n"
        "from rpo_trainer.rewards.verifiers.sandbox import limits\n"
        "limits._UNSEEN = {}\n"
        "limits._guard = lambda home: None\n"
        "outside, home = sys.argv[1:]\n"
        "os.chdir(home)\n"
        "limits.confine(home, 20, candidate=True)\n"
        "open('inside', 'w').write('x')\n"
        "fd = os.open(outside, os.O_RDONLY)\n"
        "for call in (\n"
        "    lambda: open(outside + '/new', 'w'),\n"
        "    lambda: os.open('b', os.O_CREAT | os.O_WRONLY, dir_fd=fd),\n"
        "    lambda: os.remove('victim', dir_fd=fd),\n"
        "    lambda: os.link(outside + '/victim', 'v'),\n"
        "    lambda: os.rename('inside', outside + '/moved'),\n"
        "    lambda: os.mkdir(outside + '/new'),\n"
        "    lambda: os.execv('/bin/true', ['true']),\n"
        "    lambda: os.fork() or os._exit(0),\n"
        "    lambda: socket.socket(),\n"
        "    lambda: os.setsid(),\n"
        "    lambda: os.kill(os.getppid(), 0),\n"
        "    lambda: open(f'/proc/{os.getppid()}/environ', 'rb').read(),\n"
        "):\n"
        "    try: call()\n"
        "    except OSError: continue\n"
        "    sys.exit('a call was not refused')\n"
        "for t in [threading.Thread(target=int) for _ in range(20)]: t.start()\n"
        "socket.socketpair()\n"
    )
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "victim").write_text("x")
    ended = subprocess.run(
        [sys.executable, "-c", script, str(outside), str(home)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert [p.name for p in outside.iterdir()] == ["victim"]
