"""The schema of a recipe for editors."""

from __future__ import annotations

from typing import Any

from rpo_trainer.recipe.schema import NOT_DEFAULTS, STAGE_KINDS, Recipe


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe file.

    A stage needs only `name` and `kind` here, because `defaults` may give the rest, and `defaults`
    has the fields of all kinds of stage.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    defaults: dict[str, Any] = {}
    for kind in STAGE_KINDS.values():
        stage = schema["$defs"][kind.__name__]
        stage["required"] = list(NOT_DEFAULTS)
        for name, field in stage["properties"].items():
            if name not in NOT_DEFAULTS and field not in defaults.setdefault(name, []):
                defaults[name].append(field)
    properties = schema["properties"]
    properties["defaults"] |= {
        "additionalProperties": False,
        "properties": {name: _any_of(fields) for name, fields in defaults.items()},
    }
    return schema


def _any_of(fields: list[dict[str, Any]]) -> dict[str, Any]:
    if len(fields) == 1:
        return fields[0]
    return {"description": fields[0]["description"], "anyOf": fields}
