"""JSON that matches a schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from rpo_trainer.rewards.verifiers import get_verifier
from tests.rewards.failing import unverifiable

DRAFTS = [
    jsonschema.Draft3Validator,
    jsonschema.Draft4Validator,
    jsonschema.Draft6Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft201909Validator,
    jsonschema.Draft202012Validator,
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        (' \n{"name": "Ada"}\n', 1),
        ('```json\n{"name": "Ada"}\n```', 1),
        ('```\n{"name": "Ada"}\n```\n', 1),
        ('{"age": 36}', 0),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"name": "Ada", "born": 1815}', 0),
        ('Here it is: {"name": "Ada"}', 0),
        ('{"name": "Ada"', 0),
        ("", 0),
        ("NaN", 0),
        ("[" * 100_000, 0),
    ],
)
def test_responses(response: str, reward: float) -> None:
    check = get_verifier("json_schema")
    assert check(response, {"schema": SCHEMA}) == reward
    assert check(response, {"schema": json.dumps(SCHEMA)}) == reward


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "strange"}, "'strange'"),
        ("{", " JSON"),
        (["object"], " object"),
    ],
)
def test_what_is_no_schema(schema: Any, named: str) -> None:
    with unverifiable("verifier.bad-schema", named):
        get_verifier("json_schema").prepare({"schema": schema})


@pytest.mark.parametrize(
    ("schema", "code"),
    [
        ({"$ref": "http://127.0.0.1:9/x.json"}, "verifier.unknown-reference"),
        ({"$ref": "#/$defs/absent"}, "verifier.unknown-reference"),
        (
            {"properties": {"a": {"items": {"$ref": "#/$defs/absent"}}}},
            "verifier.unknown-reference",
        ),
        ({"$ref": "#"}, "verifier.recursive-schema"),
        ({"allOf": [{"$ref": "#"}]}, "verifier.recursive-schema"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "verifier.recursive-schema"),
        ({"not": {"if": {"$ref": "#"}}}, "verifier.recursive-schema"),
        (
            {
                "properties": {"a": {"$ref": "#/$defs/x"}},
                "$defs": {
                    "x": {"$ref": "#/$defs/y"},
                    "y": {"then": {"$ref": "#/$defs/x"}, "if": {}},
                },
            },
            "verifier.recursive-schema",
        ),
        ({"pattern": "("}, "verifier.bad-schema"),
        ({"items": {"patternProperties": {"(": {}}}}, "verifier.bad-schema"),
    ],
)
def test_faults_of_the_schema_show_before_any_response(schema: Any, code: str) -> None:
    with unverifiable(code):
        get_verifier("json_schema").prepare({"schema": schema})


def test_references_that_come_to_an_end() -> None:
    tree = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "kind": {"$ref": "#/definitions/kind"}},
        "definitions": {"kind": {"enum": ["a"], "description": "see", "$comment": "$ref"}},
    }
    check = get_verifier("json_schema").prepare({"schema": tree})
    assert check('{"next": {"next": {"kind": "a"}}}') == 1.0
    assert check('{"next": {"next": {"kind": "b"}}}') == 0.0


@pytest.mark.parametrize("draft", DRAFTS)
def test_metaschemas_of_all_drafts_can_be_checked(draft: Any) -> None:
    check = get_verifier("json_schema").prepare({"schema": draft.META_SCHEMA})
    assert check('{"type": "object", "properties": {"a": {"type": "string"}}}') == 1.0
    assert check('{"type": "object", "properties": {"a": {"type": 5}}}') == 0.0
