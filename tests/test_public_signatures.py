"""Exported names, their parameters, fields and defaults are those of `public_signatures.json`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import rpo_trainer

SNAPSHOT = Path(__file__).with_name("public_signatures.json")
REWRITE = "python -m tests.test_public_signatures"


def parameters(callable_: Any) -> list[str]:
    """`name: type = default` of each parameter; `*` precedes keyword-only ones."""
    found: list[str] = []
    for name, parameter in inspect.signature(callable_).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        found.append(f"{stars}{name}: {parameter.annotation}{default}")
    return found


def shown(value: Any) -> str:
    return value.__qualname__ if callable(value) else repr(value)


def fields(config: Any) -> dict[str, str]:
    """`type = default` of the fields that the package declares; those of transformers vary."""
    owners = [c for c in config.__mro__ if c.__module__.startswith("rpo_trainer.")]
    ours = {name for owner in owners for name in inspect.get_annotations(owner)}
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        if field.name in ours:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found[field.name] = f"{field.type} = {shown(default)}"
    return found


def public() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in sorted(rpo_trainer.__all__):
        thing = getattr(rpo_trainer, name)
        if dataclasses.is_dataclass(thing):
            found[name] = fields(thing)
        else:
            found[name] = parameters(thing) if callable(thing) else type(thing).__name__
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{name}.{line}" for line in changes(old, new)]
        elif old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def test_public_signatures_are_those_of_the_snapshot() -> None:
    found = changes(json.loads(SNAPSHOT.read_text(encoding="utf-8")), public())
    assert not found, "\n".join(
        [
            *found,
            f"If this is meant: `{REWRITE}`, and a line in CHANGELOG.md for those who call it.",
        ]
    )


def test_a_parameter_a_default_and_a_field_are_part_of_it() -> None:
    def first(a: int, *, b: str = "x") -> None: ...
    def second(a: int, *, b: str = "y") -> None: ...

    @dataclasses.dataclass
    class Config:
        one: int = 1
        two: list[int] = dataclasses.field(default_factory=list)

    Config.__module__ = "rpo_trainer.anything"
    assert parameters(first) == ["a: int", "*", "b: str = 'x'"] != parameters(second)
    assert fields(Config) == {"one": "int = 1", "two": "list[int] = []"}
    assert changes({"A": {"one": "int = 1"}}, {"A": {"one": "int = 2"}}) == [
        "A.one: int = 1 -> int = 2"
    ]


if __name__ == "__main__":
    text = json.dumps(public(), indent=2, ensure_ascii=False)
    SNAPSHOT.write_text(text + "\n", encoding="utf-8")
    print(f"{SNAPSHOT.name}: {len(public())} names")
