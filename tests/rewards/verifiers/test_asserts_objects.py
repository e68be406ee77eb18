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
             "assert math.floor(pi) == 3 and helper(2) == limit"]  # fmt: skip
    setup = "from math import pi\nlimit = 4\ndef helper(x):\n    return x + 2"
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
