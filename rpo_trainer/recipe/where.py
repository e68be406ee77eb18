"""The place of a key in the recipe (file and line, or override) and in the schema."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rpo_trainer.recipe.rules.chain import stage_names
from rpo_trainer.recipe.schema import NOT_DEFAULTS, STAGE_KINDS, Recipe, Spec
from rpo_trainer.recipe.yaml_document import Key, value_at


@dataclass
class Origins:
    """The origin of each value: a line of the file or an override."""

    file: str
    data: Any
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: dict[Key, str] = field(default_factory=dict)

    def override(self, key: Key, where: str) -> None:
        """Record an override as the origin of the value at `key`, and of missing levels above it."""
        for table in (self.lines, self.overrides):
            for known in [known for known in table if known[: len(key)] == key]:
                del table[known]
        for end in range(1, len(key) + 1):
            if key[:end] not in self.lines:
                self.overrides[key[:end]] = where

    def find(self, key: Key) -> tuple[int, str]:
        """Return a sort key and the text for `where` of an error."""
        key = self._own_key(key)
        for end in range(len(key), 0, -1):
            if key[:end] in self.overrides:
                return 10**9, self.overrides[key[:end]]
            if key[:end] in self.lines:
                line = self.lines[key[:end]]
                return line, f"{self.file}:{line} ({self.dotted(key)})"
        return 1, f"{self.file}:1"

    def _own_key(self, key: Key) -> Key:
        """Return the key in `defaults` if a stage has the field from there."""
        if len(key) < 3 or key[0] != "stages" or not isinstance(self.data, dict):
            return key
        stage, defaults = self.value(key[:2]), self.data.get("defaults")
        if not isinstance(stage, dict) or not isinstance(defaults, dict):
            return key
        inherited = key[2] not in stage and key[2] in defaults
        return ("defaults", *key[2:]) if inherited else key

    def value(self, key: Key) -> Any:
        """Return the raw value at a key, or None."""
        return value_at(self.data, key)

    def locate(self, where: str) -> str:
        """Replace `stages.NAME...` or `model...` at the start of a text by its file and line.

        Stages are found by their expanded names, rounds included.
        """
        dotted, colon, rest = where.partition(": ")
        first, _, below = dotted.partition(".")
        key: Key
        if first != "stages":
            if first not in Recipe.model_fields:
                return where
            key = (first, *below.split("."))
        else:
            named = self._stage_of(below)
            if named is None:
                return where
            index, name = named
            key = ("stages", index, *below[len(name) + 1 :].split("."))
        key = tuple(int(p) if str(p).isdecimal() else p for p in key if p != "")
        return f"{self.find(key)[1]}{colon}{rest}"

    def _stage_of(self, dotted: str) -> tuple[int, str] | None:
        """Return the index of the stage at the start of a dotted key, and its name there."""
        stages = self.value(("stages",))
        for index, stage in enumerate(stages if isinstance(stages, list) else ()):
            for name in stage_names([stage]):
                if dotted == name or dotted.startswith(f"{name}."):
                    return index, name
        return None

    def stage_names(self) -> list[str]:
        """Return the names of all stages, rounds included."""
        stages = self.value(("stages",))
        named = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        return stage_names([s for s in named if isinstance(s.get("name"), str)])

    def stage_name(self, index: str | int) -> str:
        """Return the name of a stage, or its index if it has none."""
        name = self.value(("stages", index, "name"))
        return name if isinstance(name, str) and name else str(index)

    def dotted(self, key: Key) -> str:
        """Return a key as it is written in an override."""
        parts = [str(part) for part in key]
        if len(key) > 1 and key[0] == "stages":
            parts[1] = self.stage_name(key[1])
        return ".".join(parts)

    def level(self, key: Key) -> str:
        """Describe the mapping at a key: "stage `dpo`", "the recipe", "`data.filter`"."""
        if not key:
            return "the recipe"
        if len(key) == 2 and key[0] == "stages":
            return f"stage `{self.stage_name(key[1])}`"
        return f"`{self.dotted(key)}`"


def specs_in(annotation: Any) -> list[type[Spec]]:
    """Return the models in the annotation of a field."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for part in typing.get_args(annotation) for spec in specs_in(part)]


def fields_at(key: Key, data: Any) -> dict[str, str]:
    """Return names and descriptions of the fields of the mapping at `key`; empty if any key is valid."""
    if key and key[0] == "defaults":
        if len(key) == 1:
            kinds = STAGE_KINDS.values()
            every = {name: text for kind in kinds for name, text in _described(kind).items()}
            return {name: text for name, text in every.items() if name not in NOT_DEFAULTS}
        kind = next((k for k in STAGE_KINDS.values() if key[1] in k.model_fields), None)
        return _described(_walk(kind, key[1:])) if kind else {}
    if len(key) >= 2 and key[0] == "stages":
        stage = Origins("", data).value(key[:2])
        kind = STAGE_KINDS.get(str(stage.get("kind"))) if isinstance(stage, dict) else None
        return _described(_walk(kind, key[2:])) if kind else {}
    return _described(_walk(Recipe, key))


def _walk(spec: type[Spec] | None, key: Key) -> type[Spec] | None:
    for part in key:
        if spec is None or isinstance(part, int):
            continue  # elements of a list have the model of the list
        info = spec.model_fields.get(part)
        inside = specs_in(info.annotation) if info else []
        spec = inside[0] if inside else None
    return spec


def _described(spec: type[Spec] | None) -> dict[str, str]:
    if spec is None:
        return {}
    return {name: info.description or "" for name, info in spec.model_fields.items()}


@lru_cache(maxsize=1)
def places() -> Mapping[str, list[str]]:
    """Return, for each field name of the schema, descriptions of the levels that have it."""
    table: dict[str, list[str]] = {}
    kinds_of: dict[str, list[str]] = {}
    for kind, stage in STAGE_KINDS.items():
        for name in stage.model_fields:
            kinds_of.setdefault(name, []).append(kind)
    for name, kinds in kinds_of.items():
        words = f"a stage of kind {' or '.join(kinds)}"
        table[name] = ["a stage" if len(kinds) == len(STAGE_KINDS) else words]
    for name in Recipe.model_fields:
        table.setdefault(name, []).append("the top level of the recipe")
    for stage in STAGE_KINDS.values():
        _add_below(stage, ("data",), " of a stage", table)
    for top in ("model", "eval"):
        _add_below(Recipe, (top,), "", table)
    return table


def _add_below(
    owner: type[Spec], way: tuple[str, ...], of: str, table: dict[str, list[str]]
) -> None:
    """Add the fields of the model at `way`, and of all models below it."""
    for spec in specs_in(owner.model_fields[way[-1]].annotation):
        for inner in spec.model_fields:
            known = table.setdefault(inner, [])
            words = f"`{'.'.join(way)}`{of}"
            if words not in known:
                known.append(words)
            _add_below(spec, (*way, inner), of, table)
