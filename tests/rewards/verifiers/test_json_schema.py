"""JSON that keeps to a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rpo_trainer.data.rows import RowError
from rpo_trainer.rewards.verifiers import get_verifier

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
    ("schema", "message"),
    [
        ({"type": "strange"}, "no JSON schema"),
        ("{", "not JSON"),
        (["object"], "not an object"),
    ],
)
def test_what_is_no_schema(schema: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_verifier("json_schema").prepare({"schema": schema})


def test_nothing_is_fetched() -> None:
    check = get_verifier("json_schema").prepare({"schema": {"$ref": "http://127.0.0.1:9/x.json"}})
    with pytest.raises(RowError, match="refers to what is not in it"):
        check("{}")
