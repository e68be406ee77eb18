from __future__ import annotations

import math

import pytest

from rpo_trainer.recipe.yaml_document import MAX_DEPTH, YamlProblem, dump, parse, plain_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("3.E2", 300.0),
        (".5", 0.5),
        ("-1", -1),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        (".", "."),
        ("-.inf", -math.inf),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = plain_scalar(text)
    assert got == value
    assert type(got) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(plain_scalar(".nan"))


def test_a_number_of_a_thousand_digits_is_text() -> None:
    assert plain_scalar("9" * 1000) == "9" * 1000


def test_quotes_make_text_and_lines_are_those_of_the_keys() -> None:
    document = parse("a: '1'\n\nb:\n  - x: 2\n  -\n    y: \"no\"\n")
    assert document.data == {"a": "1", "b": [{"x": 2}, {"y": "no"}]}
    assert document.lines[("a",)] == 1
    assert document.lines[("b",)] == 3
    assert document.lines[("b", 0, "x")] == 4
    assert document.lines[("b", 1, "y")] == 6


def test_a_yaml_1_1_directive_does_not_change_words() -> None:
    assert parse("%YAML 1.1\n---\na: no\n").data == {"a": "no"}


def test_every_repeated_key_is_found_and_the_first_value_stays() -> None:
    document = parse("a: 1\nb: {c: 1, c: [2, 3]}\na: {d: 4}\n")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert document.repeated == [(("b", "c"), 2, 2), (("a",), 3, 1)]


def test_keys_repeated_in_a_repeated_key_are_found_too() -> None:
    document = parse("a: {b: 1, b: 2}\na: {c: 1, c: 2, b: 3}\n")
    assert document.data == {"a": {"b": 1}}
    assert [(line, first) for _, line, first in document.repeated] == [(1, 1), (2, 1), (2, 2)]


def test_keys_are_the_text_as_written() -> None:
    data = parse("010: 1\nno: 1\ntrue: 1\n1.50: 1\n~: 1\n2026-01-01: 1\n'<<': 1\n").data
    assert list(data) == ["010", "no", "true", "1.50", "~", "2026-01-01", "<<"]


def test_only_plain_values_come_out() -> None:
    data = parse("a: 1\nb: [1.0, 'x', \"y\", z, true, null]\nc: |\n  text\nd: >\n  text\n").data
    values = [data, data["a"], data["b"], *data["b"], data["c"], data["d"]]
    assert [type(value) for value in values] == [
        dict, int, list, float, str, str, str, bool, type(None), str, str
    ]  # fmt: skip


@pytest.mark.parametrize(("start", "end"), ["[]", ("{x: ", "}")])
def test_as_deep_as_allowed(start: str, end: str) -> None:
    parse(f"{start * MAX_DEPTH}1{end * MAX_DEPTH}")
    with pytest.raises(YamlProblem, match="deeply"):
        parse(f"{start * (MAX_DEPTH + 1)}1{end * (MAX_DEPTH + 1)}")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a:\n\tb: 1\n", 2, "tab"),
        ("a: [1,\n\t2]\n", 2, "tab"),
        ("a: b: c\n", 1, "YAML"),
        ("a: 1\nb: [1\n", 3, "YAML"),
        ("a: 1\nb: \x00\n", 2, "control"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "!!python/object/apply:os.system"),
        ("a: !!str 5\n", 1, "!!str"),
        ("a: 1\n[1, 2]: 3\n", 2, "key"),
        ("a: 1\nc:\n  <<: {b: 1}\n", 3, "merge keys"),
        ("a: 1\nb: &x {b: 1}\nc:\n  <<: *x\n", 2, "`&x`"),
        ("a: 1\n&x b: 1\n", 2, "`&x`"),
        ("a: *nothing\n", 1, "`*nothing`"),
        ("a: 1\n*x : 1\n", 2, "`*x`"),
        ("a: &a [1, *a]\n", 1, "`&a`"),
        ("a: 1\n!!str b: 1\n", 2, "!!str"),
        ("a: ! 5\n", 1, "tag `!`"),
        ("a: {b: {}, [1]: 2}\n", 1, "key"),
        ("a: " + "[" * 200 + "\n", 1, "deeply"),
        ("a: " + "[" * 100_000 + "\n", 1, "deeply"),
    ],
)
def test_what_is_no_recipe_text_is_refused_with_its_line(text: str, line: int, what: str) -> None:
    with pytest.raises(YamlProblem) as caught:
        parse(text)
    assert what in caught.value.what
    assert caught.value.line == line
    assert caught.value.fix


def test_what_is_dumped_is_read_again_without_anchors():
    shared = {"a": [1.5, "true", None], "ü": "x: y"}
    values = {"first": shared, "second": shared, "list": [shared["a"], shared["a"]], "0": "0"}
    text = dump(values)
    assert "&" not in text and "*" not in text
    assert parse(text).data == values
