"""No response can stop or delay scoring: any text gets a reward, in linear time."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpo_trainer.data.resumable_rows import map_rows_resumable
from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import DataError, RunError, StoppedBySignal
from rpo_trainer.recipe import ScoreSpec
from rpo_trainer.rewards.scorers import make_scorer
from rpo_trainer.rewards.verifiers import VERIFIERS, Verifier, get_verifier, score_rows
from rpo_trainer.rewards.verifiers.instructions import INSTRUCTIONS
from tests.raising import raises
from tests.rewards.failing import unverifiable

ARGUMENTS: dict[str, Any] = {
    "keywords": ["Mom", "- "], "keyword": "a ", "frequency": 10**18, "relation": "at least",
    "forbidden_words": ["rock", "--"], "letter": "a", "let_frequency": 2, "let_relation": "less than",
    "num_sentences": 10**18, "num_words": 3, "num_paragraphs": 2, "nth_paragraph": 1,
    "first_word": "a", "num_placeholders": 2, "postscript_marker": "P.P.S", "num_bullets": 2,
    "num_highlights": 2, "section_spliter": "A", "num_sections": 2, "prompt_to_repeat": "answer ",
    "end_phrase": "a ", "capital_frequency": 2, "capital_relation": "at least", "language": "en",
}  # fmt: skip
SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "string", "pattern": "^(a|b)*$"},
    {"type": "array", "uniqueItems": True, "items": {"multipleOf": 0.1}},
    {"patternProperties": {"^a": {"type": "integer"}}, "unevaluatedProperties": False},
]


def _instruction(name: str) -> Row:
    names = list(INSTRUCTIONS[name].__annotations__)
    arguments = {key: ARGUMENTS[key] for key in names if key not in ("text", "return")}
    return {"instruction_id_list": [name], "kwargs": [arguments]}


ROWS: list[tuple[str, Row]] = [
    ("exact", {"ground_truth": "5"}),
    ("partial_match", {"ground_truth": "5 a"}),
    ("numeric", {"ground_truth": "5"}),
    ("multiple_choice", {"ground_truth": "B"}),
    ("multiple_choice", {"ground_truth": "B", "choices": ["a", "answer"]}),
    ("regex", {"pattern": "a b$"}),
    *(("json_schema", {"schema": schema}) for schema in SCHEMAS),
    *(("instructions", _instruction(name)) for name in INSTRUCTIONS),
]
IDS = [row["instruction_id_list"][0] if name == "instructions" else name for name, row in ROWS]

REPEATED = [
    " ", "\n", "\n ", "\t", "\r\n", "A. ", "1", "1,", "1 ", "1/", ".", "1.", "1e999 ", "\\frac{",
    "\\boxed{", "\\", "{", "}", "[", "[a", "[]", "{},", '{"a":', "(", ")", "*", "**a", "***", "- ",
    "-", "-\n", "<", "<<", "<<a", '"', "'", "`", "#### ", "$-", "answer ", "answer is ", "word ",
    "a", "aA", "_", "?!", ".)", "P.", "。", "é", "\u3000", "\U0001f600", "\x00", "\ud800", "=", ":",
]  # fmt: skip
AROUND = [
    ("answer", " ", "x"), ("\\boxed{", " ", "B"), ("```json\n", "\n", ""), ("<<", "a", ""),
    ("<<", " ", "x"), ("1", " ", "x"), ("1 1", " ", "1"), ("\\frac", " ", "x"), ("P.P.S", " ", ""),
    (".", ")", "x"), ("x", ".", "x"), ('{"', "a", '": 1}'), ('"', "a", '"'), ("[", "1,", "1]"),
    ("[", "{},", "1]"), ("\\boxed{", "1", "}"), ("\n-", " ", "\n"), ("#### ", "1,", "1"),
]  # fmt: skip
LONG = 60_000


def _filled(text: str, length: int) -> str:
    return (text * (length // len(text) + 1))[:length]


def _responses(length: int) -> list[str]:
    repeated = [_filled(text, length) for text in REPEATED]
    around = [first + _filled(text, length) + last for first, text, last in AROUND]
    halves = [
        _filled(a, length // 2) + _filled(b, length // 2) + "x" for a in ".<*[" for b in " )\na"
    ]
    return repeated + around + halves


@pytest.mark.parametrize(("name", "row"), ROWS, ids=IDS)
def test_long_responses_take_linear_time(name: str, row: Row) -> None:
    check = VERIFIERS[name].prepare(row)
    check("to load what is loaded once")
    slow = []
    for response in _responses(LONG):
        began = time.process_time()
        reward = check(response)
        took = time.process_time() - began
        assert 0 <= reward <= VERIFIERS[name].maximum
        if took > 2:  # milliseconds if linear, minutes otherwise
            slow.append((response[:10], response[-3:], took))
    assert slow == []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    response=st.one_of(
        st.text(st.characters(codec=None, exclude_categories=()), max_size=60),
        st.text("0123456789.,/eE+-% $\\{}[]()<>*\"'`#\nabAB\ud800\x00", max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=8,
        ).map(json.dumps),
    )
)
def test_any_text_gives_a_reward(response: str) -> None:
    for name, row in ROWS:
        reward = VERIFIERS[name](response, row)
        assert isinstance(reward, float) and 0 <= reward <= VERIFIERS[name].maximum


@pytest.mark.parametrize(
    "response",
    [
        "1" * 200_000,
        "1e999999999",
        "0." + "1" * 5000 + "/" + "3" * 5000,
        "[" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        "[" + "1" * 10_000 + "]",
        "[1e400, -1e400]",
        '"\\ud800"',
        "\ud800 five \udfff",
        "\x00",
        "",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_responses_that_once_raised(response: str) -> None:
    for name, row in ROWS:
        assert 0 <= VERIFIERS[name](response, row) <= VERIFIERS[name].maximum


# ---------------------------------------------------------------- the rule for checks that fail


def _raising(error: BaseException) -> Verifier:
    def make_check(row: Row) -> Callable[[str], float]:
        def check(response: str) -> float:
            if response == "bad":
                raise error
            return 1.0

        return check

    return Verifier("mine", 1.0, ("ground_truth",), make_check)


FAULTS = [
    RecursionError("deep"), MemoryError(), OverflowError("large"), TimeoutError(), ValueError("bad"),
    RowError("row", "verifier.row"), ZeroDivisionError(),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogate"),
    OSError("fork"), AssertionError(), jsonschema.exceptions.UnknownType("x", 1, {}),
]  # fmt: skip


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_check_that_fails_gives_0_and_is_counted(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    rows = [{"id": i, "responses": ["bad", "good"]} for i in range(3)]
    scored = score_rows(rows, _raising(error))
    assert [row["rewards"] for row in scored] == [[0.0, 1.0]] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for fact in ("'mine'", "3 of 6", type(error).__name__):
        assert fact in record.getMessage()


def test_a_single_call_warns_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert _raising(ValueError("odd"))("bad", {}) == 0.0
    assert "odd" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        StoppedBySignal("stop", code="run.stop"),
        RunError("x", code="run.x"),
        ImportError(),
    ],
)
def test_what_is_not_a_fault_of_the_response_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        _raising(error)("bad", {})


def test_a_recipe_scores_by_the_same_rule(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = [{"id": "a", "responses": ["a" * 40 + "!", "aaa"], "pattern": "^(a|aa)+$"}]
    scorer = make_scorer(ScoreSpec(verifier="regex"))
    (row,) = map_rows_resumable(tmp_path / "x", rows, scorer.work(rows), key="k", what="scored")
    assert row["rewards"] == [0.0, 1.0]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "'regex'" in warning and "1 of 2" in warning and "TimeoutError" in warning


def test_a_row_of_any_shape_is_an_error_of_the_row() -> None:
    deep: Any = "end"
    for _ in range(sys.getrecursionlimit()):
        deep = {"not": deep}
    with unverifiable("verifier.bad-schema"):
        get_verifier("json_schema").prepare({"schema": deep})
    with raises("verifier.bad-schema", DataError) as error:
        score_rows([{"id": "a", "responses": ["x"], "schema": deep}], get_verifier("json_schema"))
    assert "1 of 1" in error.value.what
    many = {"ground_truth": "x" * 5, "choices": [str(i) for i in range(1_200_000)] + ["xxxxx"]}
    with unverifiable("verifier.unreadable-row"):
        get_verifier("multiple_choice").prepare(many)


# ---------------------------------------------------------------- patterns of a schema

SLOW = "^(a|aa)+$"
KEYS = json.dumps({"a" * 60 + "!": 1})
DRAFTS = ["2020-12/schema", "2019-09/schema"]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("schema", "response"),
    [
        ({"pattern": SLOW}, json.dumps("a" * 60 + "!")),
        ({"patternProperties": {SLOW: {}}}, KEYS),
        ({"additionalProperties": False, "patternProperties": {SLOW: {}}}, KEYS),
        ({"unevaluatedProperties": False, "patternProperties": {SLOW: {}}}, KEYS),
        ({"unevaluatedProperties": False, "allOf": [{"patternProperties": {SLOW: {}}}]}, KEYS),
        ({"propertyNames": {"pattern": SLOW}}, KEYS),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"pattern": SLOW}}}, json.dumps("a" * 60 + "!")),
        (
            {"items": {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": SLOW}},
            json.dumps(["a" * 60 + "!"]),
        ),
        (
            {
                "anyOf": [{"properties": {"a": {"$ref": "#"}}, "required": ["b"]}] * 3,
                "type": "object",
            },
            '{"a":' * 60 + "1" + "}" * 60,
        ),
    ],
)
def test_a_schema_has_a_time_limit(
    schema: dict[str, Any],
    response: str,
    draft: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("rpo_trainer.rewards.verifiers.schemas.SECONDS", 0.2)
    whole = {"$schema": f"https://json-schema.org/draft/{draft}", **schema}
    began = time.process_time()
    assert get_verifier("json_schema")(response, {"schema": whole}) == 0.0
    assert time.process_time() - began < 2
    assert "TimeoutError" in caplog.text


@pytest.mark.parametrize("schema", [{"uniqueItems": True}])
@pytest.mark.parametrize(
    ("value", "unique"),
    [
        ([1, True, 0, False, "1", None], True),
        ([1, 1.0], False),
        ([{"a": [1]}, {"a": [1.0]}], False),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], False),
        ([[], {}, ["a"], [["a"]]], True),
        ([[1], [True]], True),
    ],
)
def test_unique_items(schema: Any, value: Any, unique: bool) -> None:
    assert get_verifier("json_schema")(json.dumps(value), {"schema": schema}) == float(unique)
