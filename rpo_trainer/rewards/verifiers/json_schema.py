"""The JSON schema verifier: is the response JSON, and does it keep to the row's schema."""

from __future__ import annotations

import json
import re
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required
from rpo_trainer.rewards.verifiers.text import missing_library

_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL | re.IGNORECASE)


def _json_schema(row: Row) -> Check:
    """1 where the response is JSON that keeps to the row's `schema`, 0 else.

    `schema` is an object, or its JSON text. One fence of backticks around the whole response is
    taken off; words beside the JSON make it no JSON. Nothing is fetched for a `$ref`.
    """
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise missing_library("json_schema", "jsonschema") from None
    schema = _schema(required(row, "schema"))
    maker = jsonschema.validators.validator_for(schema)
    try:
        maker.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise RowError(f"`schema` is no JSON schema ({error.message})") from None
    # An empty registry: a reference to somewhere else is an error, not a download.
    validator: Any = maker(schema, registry=referencing.Registry())

    def check(response: str) -> float:
        value = parse_json(response)
        if value is _NOT_JSON:
            return 0.0
        try:
            return float(validator.is_valid(value))
        except referencing.exceptions.Unresolvable as error:
            raise RowError(f"`schema` refers to what is not in it ({error})") from None
        except RecursionError:
            raise RowError("`schema` refers to itself without an end") from None

    return check


def _schema(value: object) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("`schema` is text that is not JSON") from None
    if not isinstance(value, dict | bool):
        raise RowError("`schema` is not an object")
    return value


_NOT_JSON = object()


def parse_json(text: str) -> Any:
    """The value of a text that is JSON and nothing else; `_NOT_JSON` of any other."""
    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def is_json(text: str) -> bool:
    """Whether a text is JSON, perhaps inside one fence."""
    return parse_json(text) is not _NOT_JSON


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


JSON_SCHEMA = Verifier("json_schema", 1.0, ("schema",), _json_schema)
