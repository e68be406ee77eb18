"""The `json_schema` verifier: whether the response is JSON that conforms to the row's schema."""

from __future__ import annotations

import json
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required
from rpo_trainer.rewards.verifiers.text import missing_library


def _json_schema(row: Row) -> Check:
    """Return 1 if the response is JSON that conforms to the row's `schema`, else 0.

    `schema` is an object or its JSON text. One code fence around the entire response is removed; other text
    next to the JSON makes it invalid. `$ref` never fetches anything. A response that takes longer than
    `SECONDS` raises TimeoutError: its reward is 0.
    """
    try:
        import jsonschema
        import regex  # noqa: F401 (its searches have a timeout, those of re do not)
    except ImportError:
        raise missing_library("json_schema", "jsonschema and regex") from None
    from rpo_trainer.rewards.verifiers import schemas

    schema = _schema(required(row, "schema"))
    maker: Any = jsonschema.validators.validator_for(schema)
    try:
        maker.check_schema(schema)
        schemas.check_references(schema, maker)
    except jsonschema.SchemaError as error:
        raise RowError(
            f"`schema` is not a JSON schema ({error.message})", code="verifier.bad-schema"
        ) from None
    except RecursionError:
        raise RowError("`schema` is nested too deeply", code="verifier.bad-schema") from None
    is_valid = schemas.limited_validator(schema, maker)

    def check(response: str) -> float:
        value = parse_json(response)
        return 0.0 if value is _NOT_JSON else float(is_valid(value))

    return check


def _schema(value: object) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("`schema` is not JSON", code="verifier.bad-schema") from None
    if not isinstance(value, dict | bool):
        raise RowError("`schema` is not an object", code="verifier.bad-schema")
    return value


_NOT_JSON = object()
_FENCE = "```"


def parse_json(text: str) -> Any:
    """Parse a text that is entirely JSON; `_NOT_JSON` for any other."""
    try:
        return json.loads(_unfenced(text), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _unfenced(text: str) -> str:
    """Remove the fence of a text that is one fenced block; return other texts unchanged."""
    block = text.strip()
    opening, newline, body = block.partition("\n")
    language = opening.strip().removeprefix(_FENCE).lower()
    if newline and opening.startswith(_FENCE) and language in ("", "json"):
        return body.removesuffix(_FENCE) if body.endswith(_FENCE) else text
    return text


def is_json(text: str) -> bool:
    """Whether a text is JSON, optionally in one fence."""
    return parse_json(text) is not _NOT_JSON


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


JSON_SCHEMA = Verifier("json_schema", 1.0, ("schema",), _json_schema)
