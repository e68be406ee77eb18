"""The reference pages generated at build time: recipe fields, commands, the Python API."""

from __future__ import annotations

import json
from typing import Any

import rpo_trainer
from rpo_trainer.recipe import json_schema

Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """Path in the site → Markdown."""
    return {
        "reference/cli.md": command_page(),
        "reference/recipe-fields.md": field_page(json_schema()),
        "reference/python.md": python_page(),
    }


# ---------------------------------------------------------------- recipe fields


def field_page(schema: Schema) -> str:
    """One section per object of the recipe's JSON schema, with a table of its fields."""
    definitions: dict[str, Schema] = schema.get("$defs", {})
    objects = {name: part for name, part in definitions.items() if "properties" in part}
    lines = [
        "# Recipe fields",
        "",
        "Generated from the JSON schema that `rpo-trainer schema` prints.",
        "",
        *_section("Recipe", schema, "the whole file"),
    ]
    for name in sorted(objects):
        lines += _section(name, objects[name], objects[name].get("description", ""))
    return "\n".join(lines)


def _section(name: str, part: Schema, description: str) -> list[str]:
    required = set(part.get("required", ()))
    rows = [
        f"| `{field}` | {_type(value)} | {_default(field, value, required)} |"
        f" {_cell(value.get('description', ''))} |"
        for field, value in part.get("properties", {}).items()
    ]
    return [
        f"## {name} {{ #{name} }}", "", description, "",
        "| field | type | default | description |", "|---|---|---|---|", *rows, "",
    ]  # fmt: skip


def _type(value: Schema) -> str:
    """The type of a field as a reader writes it, with links to the objects of this page."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name})"
    if "const" in value:
        return f"`{_plain(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{_plain(choice)}`" for choice in value["enum"])
    for key in ("anyOf", "oneOf"):
        if key in value:
            kinds = [_type(one) for one in value[key] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    kind = value.get("type", "any")
    if kind == "array":
        inner = value.get("items") or {"type": "any"}
        return f"list of {_type(inner)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {_type(inner)}" if isinstance(inner, dict) and inner else "mapping"
    limits = [
        f"{sign} {value[key]:g}"
        for key, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"),
        )
        if key in value and abs(value[key]) < 1e5
    ]  # fmt: skip
    return f"{kind} {', '.join(limits)}".strip()


def _default(field: str, value: Schema, required: set[str]) -> str:
    if field in required:
        return "required"
    if "default" not in value:  # of a stage: `defaults` may have it
        return "required, here or in `defaults`"
    return "–" if value["default"] is None else f"`{_cell(_plain(value['default']))}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---------------------------------------------------------------- commands and Python


def command_page() -> str:
    """Every command with its options, rendered by mkdocs-click."""
    return "\n".join(
        [
            "# Command line", "",
            "Generated from the program's own help. [Commands](../commands.md) is the overview.", "",
            "::: mkdocs-click", "    :module: rpo_trainer.cli.commands", "    :command: cli",
            "    :prog_name: rpo-trainer", "    :style: table", "    :depth: 1", "",
        ]
    )  # fmt: skip


def python_page() -> str:
    """Every public name of the package, rendered by mkdocstrings from its docstring."""
    lines = [
        "# Python API",
        "",
        "All names are imported from `rpo_trainer`. [As a library](../library.md) is the guide.",
        "",
    ]
    for name in rpo_trainer.__all__:
        if name == "__version__":
            continue
        value = getattr(rpo_trainer, name)
        lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
    return "\n".join(lines)
