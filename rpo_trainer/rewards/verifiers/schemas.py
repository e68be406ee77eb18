"""Validate JSON schemas with a time limit, and check schemas before any response is validated.

jsonschema searches patterns with `re`, which cannot be interrupted, and may take exponential time on nested
alternatives. Here its keywords use `regex` and one deadline per response.
"""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import jsonschema
import jsonschema_specifications
import referencing
import referencing.jsonschema
import regex

from rpo_trainer.data.rows import RowError
from rpo_trainer.rewards.verifiers.base import SECONDS

_deadline = threading.local()


def limited_validator(schema: Any, maker: Any) -> Callable[[Any], bool]:
    """Return a function that checks a value against a schema; it raises TimeoutError after `SECONDS`."""
    # An empty registry: external references are errors and never downloaded.
    validator = _limited(maker)(schema, registry=referencing.Registry())

    def is_valid(value: Any) -> bool:
        _deadline.ends = time.monotonic() + SECONDS
        return bool(validator.is_valid(value))

    return is_valid


class _Patterns:
    """Replaces the module `re` in the keywords of jsonschema."""

    @staticmethod
    def search(pattern: str, text: str) -> Any:
        return _compiled(pattern).search(text, timeout=_left())


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _left() -> float:
    left = float(_deadline.ends - time.monotonic())
    if left <= 0:
        raise TimeoutError("validation takes too long")
    return left


@cache
def _limited(maker: Any) -> Any:
    """Return a validator class whose keywords search with a time limit.

    The keywords are copies of jsonschema's functions with `_Patterns` in place of `re`;
    `jsonschema.validators.extend` alone does not cover the patterns of `additionalProperties` and
    `unevaluatedProperties`.
    """
    copies: dict[int, Any] = {}
    keywords = {name: _timed(_copy(keyword, copies)) for name, keyword in maker.VALIDATORS.items()}
    limited = jsonschema.validators.extend(maker, keywords)
    # Otherwise a subschema with `$schema` is validated by another class, without a limit.
    original = limited.evolve

    def evolve(self: Any, **changes: Any) -> Any:
        evolved = original(self, **changes)
        if type(evolved) is limited:
            return evolved
        kind: Any = type(evolved)
        other = _limited(kind)
        return other(
            schema=evolved.schema,
            format_checker=evolved.format_checker,
            registry=evolved._registry,
            _resolver=evolved._resolver,
        )

    limited.evolve = evolve
    return limited


def _timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
    def timed(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _left()
        return keyword(validator, value, instance, schema)

    return timed


def _copy(function: Any, copies: dict[int, Any]) -> Any:
    """Copy a function with `re` replaced in its globals and in those of the functions it calls."""
    if not isinstance(function, types.FunctionType):
        return function
    if id(function) in copies:
        return copies[id(function)]
    names = function.__globals__
    own = dict(names)
    copy = types.FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copies[id(function)] = copy
    for name in _names(function.__code__):
        value = names.get(name)
        if name == "re":
            own[name] = _Patterns
        elif name == "uniq":
            own[name] = _all_different
        elif isinstance(value, types.FunctionType) and value.__module__.startswith("jsonschema."):
            own[name] = _copy(value, copies)
    return copy


def _names(code: types.CodeType) -> set[str]:
    """Return the names that the code of a function looks up, including its comprehensions."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _all_different(values: Any) -> bool:
    """Check `uniqueItems` in linear time; jsonschema compares all pairs of arrays and objects."""
    seen = set()
    for value in values:
        key = _hashable(value)
        if key in seen:
            return False
        seen.add(key)
    return True


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return "object", frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_hashable, value))
    return ("boolean", value) if isinstance(value, bool) else value  # True is not 1


# ---------------------------------------------------------------- checks of the schema

_IN_PLACE = ("not", "if", "then", "else", "allOf", "anyOf", "oneOf", "extends")


def check_references(schema: Any, maker: Any) -> None:
    """Raise RowError for unresolvable or circular references and invalid patterns."""
    specification = referencing.jsonschema.specification_with(
        maker.META_SCHEMA.get("$schema", ""), default=referencing.jsonschema.DRAFT202012
    )
    resource = specification.create_resource(schema)
    resolver = jsonschema_specifications.REGISTRY.resolver_with_root(resource)
    seen: dict[int, int] = {}

    def check(resource: Any, resolver: Any) -> None:
        _check_patterns(resource.contents)
        _follow(resource.contents, resolver, specification, seen)
        for below in resource.subresources():
            if isinstance(below.contents, dict):  # `dependencies` may contain lists of names
                check(below, resolver.in_subresource(below))

    check(resource, resolver)


def _check_patterns(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    for pattern in [schema.get("pattern"), *(schema.get("patternProperties") or ())]:
        try:
            if isinstance(pattern, str):
                _compiled(pattern)
        except regex.error as error:
            raise RowError(
                f"`schema` has an invalid regular expression {pattern!r} ({error})",
                code="verifier.bad-schema",
            ) from None


_OPEN, _DONE = 1, 2


def _follow(schema: Any, resolver: Any, specification: Any, seen: dict[int, int]) -> None:
    """Follow all schemas that apply to the same value; raise RowError if this does not end."""
    if not isinstance(schema, dict) or seen.get(id(schema)) == _DONE:
        return
    if seen.get(id(schema)) == _OPEN:
        raise RowError(
            "the references of `schema` form an endless loop", code="verifier.recursive-schema"
        )
    seen[id(schema)] = _OPEN
    for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
        reference = schema.get(keyword)
        if isinstance(reference, str):
            try:
                found = resolver.lookup(reference)
            except referencing.exceptions.Unresolvable as error:
                raise RowError(
                    f"`schema` has a reference that cannot be resolved ({error})",
                    code="verifier.unknown-reference",
                ) from None
            _follow(found.contents, found.resolver, specification, seen)
    for below in _applied_in_place(schema):
        below_resolver = resolver.in_subresource(specification.create_resource(below))
        _follow(below, below_resolver, specification, seen)
    seen[id(schema)] = _DONE


def _applied_in_place(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found: list[Any] = []
    for keyword in _IN_PLACE:
        value = schema.get(keyword)
        found += value if isinstance(value, list) else [value]
    for keyword in ("dependentSchemas", "dependencies"):
        value = schema.get(keyword)
        found += value.values() if isinstance(value, dict) else ()
    yield from (below for below in found if isinstance(below, dict))
