"""Tests use a response's functions, classes and objects as if they ran in one process."""

from __future__ import annotations

import pytest

from rpo_trainer.rewards.verifiers.asserts import run_tests

PLAIN = """
import collections, datetime, decimal, fractions
values = [1, 1.5, -0.0, 10**5000, 2j, None, True, "ü\\ud800", b"\\xff", bytearray(b"a"), (1, [2]),
          {1: {2}, "a": (1,)}, frozenset({1}), range(3), slice(1, None), float("inf"),
          decimal.Decimal("1.50"), fractions.Fraction(1, 3), datetime.date(2020, 1, 2),
          datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(1),
          collections.OrderedDict(a=1), collections.Counter("aab"), collections.deque([1], 3), int,
          ValueError, ..., [[[]]], {}, [None, "a", 1]]
def get(i):
    return values[i]
def same(value, i):
    return value == values[i] and type(value) is type(values[i])
count = len(values)
"""


def test_plain_values_arrive_with_their_type() -> None:
    setup = PLAIN.split("def get")[0].replace("values", "expected")
    tests = [setup] + [
        test
        for i in range(30)
        for test in (f"assert get({i}) == expected[{i}] and type(get({i})) is type(expected[{i}])",
                     f"assert same(expected[{i}], {i})")
    ]  # fmt: skip
    assert run_tests(PLAIN, [*tests, "assert count == 30"]) == 1.0
    assert run_tests(PLAIN, ["assert str(get(2)) == '-0.0'", "assert get(23).maxlen == 3"]) == 1.0


CLASSES = """
import collections, enum
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum):
    RED = 1
class Name(str):
    pass
class Vector:
    def __init__(self, x): self.x = x
    def __mul__(self, k): return Vector(self.x * k)
    __rmul__ = __mul__
    def __add__(self, other): return Vector(self.x + other.x)
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
    def __len__(self): return 3
    def __bool__(self): return self.x != 0
    def __iter__(self): yield from (1, 2)
    def __contains__(self, item): return item == 7
    def __repr__(self): return f"Vector({self.x})"
    def __enter__(self): return self
    def __exit__(self, *error): return True
    def __getitem__(self, key): return self.x
    def __setitem__(self, key, value): self.x = value
    def __abs__(self): return abs(self.x)
    @property
    def double(self): return self.x * 2
    @staticmethod
    def zero(): return Vector(0)
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert Point(1, 2) == (1, 2) and Point(1, 2).x == 1 and Point(1, 2) == Point(1, 2)",
        "a, b = Point(1, 2); assert (a, b) == (1, 2)",
        "assert Color.RED == 1 and Color.RED + 1 == 2 and Color.RED < 2 and Color.RED is Color.RED",
        "assert Name('x') == 'x' and Name('x') != 'y'",
        "assert {1: 2}.keys() == {1}",
        "assert (Vector(2) * 3).x == 6 and (2 * Vector(2)).x == 4",
        "assert Vector(1) + Vector(2) == Vector(3) and Vector(1) != Vector(2)",
        "assert Vector(1) < Vector(2) and sorted([Vector(2), Vector(1)])[0].x == 1",
        "assert len(Vector(1)) == 3 and list(Vector(1)) == [1, 2] and not Vector(0)",
        "assert 7 in Vector(1) and 8 not in Vector(1)",
        "assert repr(Vector(1)) == str(Vector(1)) == f'{Vector(1)}' == 'Vector(1)'",
        "with Vector(1) as v:\n    raise ValueError\nassert v.x == 1",
        "v = Vector(1); v[0] = 9; assert v[0] == 9 == v.x; v.x = 4; assert v.double == 8",
        "assert isinstance(Vector(1), Vector) and not isinstance(Vector(1), (int, list))",
        "assert Vector(1).__class__.__name__ == 'Vector' and hasattr(Vector(1), 'x')",
        "assert not hasattr(Vector(1), 'z') and getattr(Vector(1), 'z', 5) == 5",
        "assert abs(Vector(-2)) == 2 and Vector.zero().x == 0",
    ],
)
def test_classes(test: str) -> None:
    assert run_tests(CLASSES, [test]) == 1.0


FUNCTIONS = """
import json
class Own(ValueError):
    def __init__(self, message, code=3):
        super().__init__(message)
        self.code = code
def fail(): raise Own("oops", 7)
def parse(text): return int(text)
def load(text): return json.loads(text)
def numbers():
    n = 0
    while True:
        yield (n := n + 1)
def sort(x): x.sort()
def change(x, **more):
    x.append(x.pop(0)); more["d"]["k"] = 1
def flip(rows):
    for row in rows: row.reverse()
def clear(s): s.clear()
def apply(f, items): return [f(item) for item in items]
def collect(items): return list(items)
def adder(n): return lambda x: x + n
def same(x): return x
def early(n): return next(i for i in range(n, 99))
def name_of(o): return o.name
"""


@pytest.mark.parametrize(
    "test",
    [
        "try: fail()\nexcept ValueError as e: assert str(e) == 'oops'\nelse: assert False",
        "try: fail()\nexcept Own as e: assert e.code == 7\nelse: assert False",
        "assert issubclass(Own, ValueError) and Own('a', 5).code == 5",
        "try: parse('x')\nexcept ValueError as e: assert 'invalid literal' in str(e)\nelse: 1 / 0",
        "import json\ntry: load('x')\nexcept json.JSONDecodeError: pass\nelse: assert False",
        "try: parse()\nexcept TypeError: pass\nelse: assert False",
        "g = numbers(); assert next(g) == 1 and next(g) == 2",
        "import itertools; assert list(itertools.islice(numbers(), 3)) == [1, 2, 3]",
        "x = [3, 1]; y = x; sort(x); assert x == [1, 3] and y is x",
        "x = [1, 2]; d = {}; change(x, d=d); assert x == [2, 1] and d == {'k': 1}",
        "m = [[1, 2], [3, 4]]; row = m[0]; flip(m); assert row == [2, 1] and m == [row, [4, 3]]",
        "s = {1}; clear(s); assert s == set()",
        "b = bytearray(b'a'); clear(b); assert b == b''",
        "assert apply(lambda x: x * 2, [1, 2]) == [2, 4] and apply(len, ['a']) == [1]",
        "assert apply(adder(1), [1]) == [2] and adder(2)(3) == 5",
        "assert apply(lambda x: early(x), [1, 2]) == [1, 2]",
        "def square(x): return x * x\nassert same(square) is square and same(square)(3) == 9",
        "try: apply(lambda x: 1 / 0, [1])\nexcept ZeroDivisionError: pass\nelse: assert False",
        "assert collect(iter([1])) == collect(x for x in [1]) == collect(map(int, '1')) == [1]",
        "class Thing:\n    name = 'n'\nassert name_of(Thing()) == 'n'",
        "def check(candidate):\n    assert candidate([2]) == [2]\n    assert early(3) == 3\ncheck(collect)",
    ],
)
def test_functions_exceptions_and_callbacks(test: str) -> None:
    assert run_tests(FUNCTIONS, [test]) == 1.0


def test_statements_share_names_and_see_the_setup() -> None:
    tests = ["def check(candidate):\n    assert candidate(2) == limit", "check(f)", "import math",
             "assert math.floor(pi) == 3 and twice(2) == limit"]  # fmt: skip
    setup = "from math import pi\nlimit = 4\nadd = 2\ndef twice(x): return 2 * x\n" \
            "def helper(x): return x + add"  # fmt: skip
    assert run_tests("def f(x): return helper(x)", tests, setup=setup) == 1.0


def test_arrays() -> None:
    pytest.importorskip("numpy")
    code = "import numpy as np\ndef f(): return np.arange(3)\ndef g(a): a += 1\n"
    tests = ["assert (f() == np.arange(3)).all()", "a = np.zeros(2); g(a); assert a.sum() == 2"]
    assert run_tests(code, tests) == 1.0


def test_any_number_of_tests_is_counted() -> None:
    tests = [f"assert add({i}, 1) == {i + (i % 4 > 0)}" for i in range(20_000)]
    assert run_tests("def add(a, b): return a + b", tests, seconds=60) == 0.75
    assert run_tests("x = 1", ["assert x == 1"] * 100_000, seconds=120) == 1.0


def test_a_test_that_ends_the_response_fails_those_after_it() -> None:
    code = "import os\ndef f(x): return x\ndef end(): os._exit(0)"
    tests = ["assert f(1) == 1", "end()", "assert f(1) == 1", "assert True"]
    assert run_tests(code, tests) == 0.25


def test_a_task_may_ask_for_a_function_named_like_a_builtin() -> None:
    double = "import builtins\ndef sum(values):\n    return 2 * builtins.sum(values)\n"
    assert run_tests(double, ["assert sum([1, 2]) == 6", "assert sum([]) == 0"]) == 1.0
    helped = f"{double}def total(values):\n    return sum(values)\n"
    assert run_tests(helped, ["assert total([1, 2]) == 6", "assert sum([1, 2]) == 3"]) == 1.0


def test_a_response_does_not_replace_the_builtins_of_a_comparison() -> None:
    cheat = "def abs(value):\n    return 0\ndef f(x):\n    return 0.0\n"
    assert run_tests(cheat, ["assert abs(f(1) - 3.14) < 1e-6"]) == 0.0
    assert run_tests("def abs(value):\n    return 0\n", ["assert abs(f(1) - 3.14) < 1e-6"]) == 0.0


TREE = """
class Tree:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right
    def __eq__(self, other):
        return isinstance(other, Tree) and vars(self) == vars(other)
    def __lt__(self, other): return self.val < other.val
    __hash__ = None
"""
DATA = "from dataclasses import dataclass\n@dataclass\nclass Tree:\n    val: int = 0\n" \
       "    left: 'Tree' = None\n    right: 'Tree' = None\n"  # fmt: skip
INVERT = """
from typing import Optional
class Solution:
    def invert(self, tree: Optional[Tree]) -> "Tree | None":
        return tree and Tree(tree.val, self.invert(tree.right), self.invert(tree.left))
def swap(tree):
    if isinstance(tree, Tree):
        tree.left, tree.right = swap(tree.right), swap(tree.left)
    return tree
def least(trees):
    import heapq
    heapq.heapify(trees)
    return trees[0]
"""


@pytest.mark.parametrize("setup", [TREE, DATA])
@pytest.mark.parametrize("code", [INVERT, TREE + INVERT])
def test_both_sides_have_the_classes_of_the_setup(setup: str, code: str) -> None:
    tests = [
        "assert Solution().invert(Tree(1, Tree(2))) == Tree(1, None, Tree(2))",
        "assert Tree(1, None, Tree(2)) == Solution().invert(Tree(1, Tree(2)))",
        "assert isinstance(Solution().invert(Tree(1)), Tree)",
        "t = Tree(1, Tree(2)); assert swap(t) is t and t.right.val == 2 and t.left is None",
        "assert Solution().invert(Tree(1, Tree(2))) != Tree(1, None, Tree(3))",
    ]
    assert run_tests(code, tests, setup=setup) == 1.0
    if setup == TREE:
        assert run_tests(code, ["assert least([Tree(2), Tree(1)]).val == 1"], setup=setup) == 1.0
    wrong = code.replace("self.invert(tree.left)", "None")
    assert run_tests(wrong, tests[:1], setup=setup) == 0.0


STANDARD = """
from __future__ import annotations
import array, asyncio, collections, datetime as dt, fractions, ipaddress, pathlib, statistics, threading
import types, uuid, zoneinfo
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
string = "abc"
@dataclass(frozen=True, order=True)
class P:
    x: int
    y: list = field(default_factory=list)
class Ordered(collections.OrderedDict): pass
class Many:
    def __iter__(self): return iter([1])
@lru_cache
def bisect(x): return x
def when(): return datetime(2020, 1, 1)
def zone(): return datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC"))
def numbers(): yield 1
def mean(x): return statistics.mean(x)
def ident(): return uuid.UUID(int=1), pathlib.Path("a") / "b", ipaddress.ip_address("1.1.1.1")
def live(): return [types.SimpleNamespace(a=1), array.array("i", [1]), memoryview(b"ab"),
                    collections.ChainMap({1: 2}), collections.UserList([1])]
def threads():
    seen = []
    for t in [threading.Thread(target=seen.append, args=(i,)) for i in range(8)]: t.start(); t.join()
    return len(seen)
def loop():
    async def one(): return await asyncio.sleep(0, 1)
    return asyncio.run(one())
def wrap(f):
    import functools
    return functools.wraps(f)(lambda *a: f(*a))
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert P(1) == P(1) and P(1) < P(2) and P(1).y == [] and repr(P(1)) == 'P(x=1, y=[])'",
        "assert when() == datetime(2020, 1, 1) and when().year == datetime(2020, 2, 1).year",
        "assert string == 'abc' and string.upper() == 'ABC' and bisect(1) == 1",
        "assert string + 'd' == 'abcd' and dt.date(2020, 1, 1) == dt.date(2020, 1, 1)",
        "from zoneinfo import ZoneInfo\nassert zone() == datetime(2020, 1, 1, tzinfo=ZoneInfo('UTC'))",
        "import uuid, ipaddress; from pathlib import Path\n"
        "assert ident() == (uuid.UUID(int=1), Path('a/b'), ipaddress.ip_address('1.1.1.1'))",
        "import array, types, collections as c\nassert live() == [types.SimpleNamespace(a=1), "
        "array.array('i', [1]), b'ab', c.ChainMap({1: 2}), c.UserList([1])]",
        "n = live()[0]; n.a = 5; assert n.a == 5",
        "from collections.abc import Iterable, Iterator\n"
        "assert isinstance(Many(), Iterable) and not isinstance(Many(), (Iterator, int))",
        "import types; assert isinstance(Ordered(), dict) and isinstance(numbers(), types.GeneratorType)",
        "assert type(P(1)) is P and type(P) is type and type(1) is int and isinstance(int, type)",
        "class Meta(type): pass\nclass A(metaclass=Meta): pass\nassert type(A) is Meta and A() != P(1)",
        "import statistics\ntry: mean([])\nexcept statistics.StatisticsError: pass\nelse: 1 / 0",
        "assert threads() == 8 and loop() == 1",
        "@wrap\ndef named(x):\n    'text'\nassert (named.__name__, named.__doc__) == ('named', 'text')",
    ],
)
def test_ordinary_uses_of_the_standard_library(test: str) -> None:
    assert run_tests(STANDARD, [test]) == 1.0


STREAMS = """
import sys
def say(x):
    print("said", x); sys.stdout.write("ü\\n")
    return x
def ask(): return int(input("?")) + 1
def lines(): return [line.strip() for line in sys.stdin]
def read(file): return file.read()
def write(file): file.write("x"); return file
def first(file):
    with file as f: return next(f)
def put(x): x.append(1); return x
def one(a, b): return a is b
print("while it is loaded")
"""


@pytest.mark.parametrize(
    "test",
    [
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    say(1)\n"
        "    print('test')\n    say(2)\nassert out.getvalue() == 'said 1\\nü\\ntest\\nsaid 2\\nü\\n'",
        "import sys, io\nkept, sys.stdout = sys.stdout, io.StringIO()\nsay(1)\n"
        "text = sys.stdout.getvalue(); sys.stdout = kept\nassert text.startswith('said 1')",
        "from unittest.mock import patch\nwith patch('builtins.input', return_value='3') as asked:\n"
        "    assert ask() == 4\nasked.assert_called_once_with('?')",
        "from unittest.mock import patch\nwith patch('builtins.print') as shown:\n    say(3)\n"
        "shown.assert_called_once_with('said', 3)",
        "import sys, io; sys.stdin = io.StringIO('a\\nb\\n'); assert lines() == ['a', 'b']",
        "import sys, io; sys.stdin = io.StringIO('41\\n'); assert ask() == 42",
        "try: ask()\nexcept EOFError: pass\nelse: assert False",
        "import io; assert read(io.StringIO('abc')) == 'abc' and read(io.BytesIO(b'a')) == b'a'",
        "import io; f = io.StringIO(); assert write(f) is f and f.getvalue() == 'x'",
        "open('z', 'w').write('a\\n')\nassert first(open('z')) == 'a\\n'",
        "x = []; assert put(x) is x and x == [1] and one(x, x) and not one([], [])",
    ],
)
def test_streams_files_and_identity(test: str) -> None:
    assert run_tests(STREAMS, [test]) == 1.0


def test_a_callback_may_fail_like_the_network() -> None:
    code = (
        "def retry(call):\n"
        "    for _ in range(5):\n"
        "        try: return call()\n"
        "        except OSError: pass\n"
    )
    test = (
        "tries = []\ndef call():\n    tries.append(1)\n"
        "    if len(tries) < 3: raise {}\n    return 'ok'\nassert retry(call) == 'ok'"
    )
    for error in ("ConnectionError('x')", "TimeoutError()", "BrokenPipeError"):
        assert run_tests(code, [test.format(error)]) == 1.0
