"""Objects, names and exceptions of a response do not decide what a test compares."""

from __future__ import annotations

import pytest

from rpo_trainer.rewards.verifiers.asserts import run_tests

FED = """
import datetime
class F(float): pass
class I(int): pass
class X:
    days = 0
    __sub__ = __rsub__ = __add__ = __radd__ = __mod__ = lambda self, other: type(self)()
    __truediv__ = __pow__ = lambda self, other, *m: F(1.0)
    __xor__ = lambda self, other: I(0)
    __abs__ = __round__ = __neg__ = lambda self, *a: 0.0
    __float__ = __int__ = __index__ = __bool__ = __len__ = __hash__ = lambda self: 0
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
    __iter__ = lambda self: iter(())
    __getitem__ = lambda self, key: 0
    __format__ = lambda self, spec: "0.00"
    __str__ = __repr__ = lambda self: "[]"
    __array__ = lambda self, *a, **k: __import__("numpy").zeros(2)
    total_seconds = all = any = sum = max = tolist = lambda self: 0
class Y(X):
    __sub__ = __rsub__ = __add__ = __radd__ = lambda self, other: F(0.0)
def f(x): return X()
def g(x): return Y()
"""


@pytest.mark.parametrize("name", ["f", "g"])
@pytest.mark.parametrize(
    "test",
    [
        "(f(2) - 3.5) ** 2 < 1e-9", "f(2) - 3.5 == 0", "0 == f(2) - 3.5", "-1e-6 < f(2) - 3.5 < 1e-6",
        "f(2) / 3.5 == 1", "f(2) ^ 3 == 0", "abs(f(2) - 3.5) < 1e-6", "f(2) % 3.5 == 0",
        "max(f(2) - 3.5, 3.5 - f(2)) < 1e-6", "min(f(2) - 3.5, 1) == 0", "sum([f(2) - 3.5]) == 0",
        "sum((f(i) - i) ** 2 for i in (1, 2)) < 1", "not f(2) - 3.5", "[f(2) - 3.5] == [0]",
        "f(2) - 3.5 in (0, 1)", "0 in {f(2) - 3.5}", "{0: 1}.get(f(2) - 3.5) == 1", "-(f(2) - 3) == 0",
        "round(f(2) - 3.5, 3) == 0", "int(f(2) - 3.5) == 0", "float(f(2) - 3.5) == 0",
        "bool(f(2) - 3.5) is False", "math.isclose(f(2) - 3.5, 0, abs_tol=1e-9)",
        "math.fabs(f(2) - 3.5) < 1", "f'{f(2) - 3.5:.2f}' == '0.00'", "sorted([f(2) - 3, 1])[0] == 0",
        "list(range(f(2) - 3)) == []", "len(f(2) - {1}) == 0", "list(f(2) - {1}) == []",
        "str(f(2) - {1}) == '[]'", "all(x == 0 for x in f(2) - {1})", "not [x for x in f(2) - {1}]",
        "(f(2) - datetime.date(2020, 1, 1)).days == 0", "5 in f(2) - 3", "pow(f(2), 2, 7) == 1",
        "(f(2) - datetime.timedelta(1)).total_seconds() == 0", "(f(2) - 3.5).__abs__() == 0",
        "f(2).__sub__(3.5) == 0", "divmod(f(2), 2) == (0, 0)", "(f(2) - 3.5).real == 1",
        "any(map(lambda d: d == 0, [f(2) - 1]))",
    ],
)  # fmt: skip
def test_no_operator_gives_a_value_that_knows_the_expected_one(test: str, name: str) -> None:
    test = test.replace("f(", f"{name}(")
    assert run_tests(FED, [f"assert {test}"], setup="import datetime, math") == 0.0


@pytest.mark.parametrize(
    "test",
    ["np.allclose(f(2) - 3.5, 0)", "np.isclose(f(2), 3.5)", "np.abs(f(2) - 3.5) < 1e-6",
     "(f(2) - np.array([1, 2])).sum() == 0", "(f(2) - np.array([1])).max() == 0",
     "np.asarray(f(2) - 3.5).sum() == 0", "np.array_equal(np.array([3.5]) - f(2), [0])"],
)  # fmt: skip
def test_nor_does_numpy(test: str) -> None:
    pytest.importorskip("numpy")
    assert run_tests(FED, [f"assert {test}"], setup="import numpy as np") == 0.0


def test_arithmetic_with_objects_of_a_class_that_the_task_asks_for() -> None:
    code = (
        "class V:\n"
        "    def __init__(self, *x): self.x = x\n"
        "    def __mul__(self, k): return V(*(i * k for i in self.x))\n"
        "    __rmul__ = __mul__\n"
        "    def __sub__(self, o): return V(*(a - b for a, b in zip(self.x, o.x)))\n"
        "    def __eq__(self, o): return self.x == o.x\n"
        "    def __getitem__(self, i): return self.x[i]\n"
        "    def __repr__(self): return f'V{self.x}'\n"
    )
    tests = ["(V(1) * 3).x == (3,)", "V(2) * 3 == V(6)", "2 * V(1) - V(1) == V(1)", "(V(1) * 2)[0] == 2",
             "str(V(1, 2) * 2) == 'V(2, 4)'", "list(V(1, 2) * 2) == [2, 4]"]  # fmt: skip
    assert run_tests(code, [f"assert {test}" for test in tests]) == 1.0


CHECK = "limit = 3\ndef check(candidate):\n    assert candidate(1, 2) == limit\n"
CASES = (
    "import unittest\nclass Case(unittest.TestCase):\n    expected = 3\n"
    "    def test(self): self.assertEqual(add(1, 2), self.expected)\n"
)
RUN_CASES = (
    "import unittest\nassert unittest.TextTestRunner(open('log', 'w')).run("
    "unittest.defaultTestLoader.loadTestsFromTestCase(Case)).wasSuccessful()"
)


@pytest.mark.parametrize(
    ("setup", "test"), [(CHECK, "check(add)"), (CASES, RUN_CASES), (CHECK + CASES, RUN_CASES)]
)
@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b): return 0\n@lambda f: lambda c: None",
        "def add(a, b): return 0\ndef check(c): pass\nclass Case: pass\nlimit = 0",
        "def add(a, b): return limit",
        "def add(a, b): return Case.expected",
        "import gc\nfound = [v for o in gc.get_objects() if type(o) is dict for v in o.values()]\n"
        "text = str([v for v in found if type(v) is str])\n"
        "limit = 3 if 'candid' + 'ate(1' in text or 'assertEq' + 'ual(add' in text else 0\n"
        "def add(a, b): return limit",
        "def add(a, b): return globals().get('lim' + 'it') or globals()['Ca' + 'se'].expected",
        "if 1:",
        '"""',
    ],
)
def test_the_setup_is_not_where_the_response_is(code: str, setup: str, test: str) -> None:
    assert run_tests(code, [test], setup=setup) == 0.0


@pytest.mark.parametrize(("setup", "test"), [(CHECK, "check(add)"), (CASES, RUN_CASES)])
def test_tests_in_the_setup_pass_a_right_response(setup: str, test: str) -> None:
    assert run_tests("def add(a, b): return a + b", [test], setup=setup) == 1.0


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def sum(a): return 0\ndef abs(x): return 0.0", "assert abs(sum([0.1, 0.2]) - 0.3) < 1e-6"),
        ("def sum(a): return 0\ndef abs(x): return 0.0",
         "got = sum([0.1, 0.2])\nassert abs(got - 0.3) < 1e-6"),
        ("def bisect(*a): return 0\ndef abs(x): return 0.0", "assert abs(bisect(1, 2) - 0.5) < 1e-3"),
        ("def abs(x): return 0.0", "import math\nassert abs(math.sqrt(4) - 3) < 1"),
        ("def sorted(x): return 1", "def f(x): return [3]\nassert sorted(f(1)) == sorted([1])"),
        ("def json(): pass\njson.dumps = lambda x: 1", "assert json.dumps([1]) == json.dumps([2])"),
        ("class heapq:\n    nsmallest = lambda *a: 1",
         "assert heapq.nsmallest(1, [1]) == heapq.nsmallest(1, [2])"),
        ("class string:\n    capwords = lambda *a: 1",
         "assert string.capwords('a') == string.capwords('b')"),
    ],
)  # fmt: skip
def test_names_of_the_library_do_not_decide_a_test(code: str, test: str) -> None:
    assert run_tests(code, [test]) == 0.0


def test_the_one_builtin_that_the_tests_are_about_comes_from_the_response() -> None:
    tests = ["assert abs(sum([0.1, 0.2]) - 0.3) < 1e-6", "assert sum([1, 2]) == 3"]
    assert run_tests("def sum(a): return 0\n", tests) == 0.0
    helped = "import math\ndef abs(x): return 0\ndef sum(a): return math.fsum(a)\n"
    assert run_tests(helped, tests) == 1.0
    check = "def check(candidate):\n    assert candidate([1]) == 2"
    assert run_tests("def sum(a): return 2", ["check(sum)"], setup=check) == 1.0


CASE = RUN_CASES.replace(
    "import unittest\n",
    "import unittest\nclass Case(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n",
)


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("import unittest\ndef f(x): raise unittest.SkipTest('no')", CASE),
        ("import unittest\nclass E(unittest.SkipTest): pass\ndef f(x): raise E('no')", CASE),
        ("import unittest.case\ndef f(x): raise unittest.case._ShouldStop", CASE),
        ("def f(x): raise StopIteration", "assert all(map(lambda c: f(c) == 5, [1, 2]))"),
        ("class E(StopIteration): pass\ndef f(x): raise E", "assert all(map(f, [1]))"),
        ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept Exception: pass"),
        (
            "import os\ndef f(x): os._exit(0)",
            "import contextlib\nwith contextlib.suppress(EOFError): f(1)",
        ),
    ],
)
def test_exceptions_do_not_steer_a_test(code: str, test: str) -> None:
    assert run_tests(code, [test]) == 0.0


@pytest.mark.parametrize("test", ["assert 2000 < x < -2000", "assert x > 2000 and x == -10**9"])
def test_a_value_stays_what_it_was(test: str) -> None:
    code = (
        "class F(int):\n"
        "    values = iter([10**9, -10**9])\n"
        "    def __int__(self): return next(self.values)\n"
        "x = F(3)\n"
    )
    assert run_tests(code, [test]) == 0.0


def test_numpy_reads_no_memory_at_an_address_of_the_response() -> None:
    pytest.importorskip("numpy")
    code = (
        "class X:\n"
        "    __array_interface__ = {'shape': (2,), 'typestr': '<f8', 'data': (9999, False), 'version': 3}\n"
        "def f(): return X()\n"
    )
    assert run_tests(code, ["import numpy as np\nassert np.asarray(f()).shape == (2,)"]) == 0.0


def test_messages_build_no_objects_in_the_tester() -> None:
    code = (
        "import gc, sys\n"
        "Peer = sys.modules['sandbox.peer'].Peer\n"
        "def f(x):\n"
        "    peer = next(o for o in gc.get_objects() if type(o) is Peer)\n"
        "    def request(*message):\n"
        "        peer.channel.send(list(message))\n"
        "        return peer.channel.receive()[1]\n"
        "    yes = ['own', peer.codec.keep(lambda *a: True), None]\n"
        "    methods = ['pairs', 'dict', [['__eq__', yes]]]\n"
        "    kind = request('call', ['type', 'type'],\n"
        "                   ['Evil', ['items', 'tuple', [['type', 'object']]], methods], {})\n"
        "    evil = request('call', ['yours', kind[1]], [], {})\n"
        "    peer.channel.send(['result', ['yours', evil[1]], None, []])\n"
        "    while True: peer.serve(peer.channel.receive())\n"
    )
    assert run_tests(code, ["assert f(1) == 5"]) == 0.0
