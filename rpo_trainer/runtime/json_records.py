"""Dataclasses in JSON files: types are checked when read, None is not written."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

RecordT = TypeVar("RecordT", bound="JsonRecord")


class JsonRecord:
    """Base of dataclasses in a JSON file.

    Metadata of fields: `key`, the name in the file; `absent`, the value written for None (without it the key
    is omitted); `rest`, the field for entries that no other field names.
    """

    @classmethod
    def from_json(cls: type[RecordT], value: Any, *, lenient: bool = False) -> RecordT:
        """Create a record from the result of `json.loads`.

        Args:
            lenient: omit entries of a wrong type or that are not finite.

        Raises:
            ValueError: an entry has a wrong type, or a required one is missing.
        """
        found: RecordT = _read(cls, value, cls.__name__, lenient)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return dicts, lists, strings and numbers for `json.dumps`."""
        plain: dict[str, Any] = _plain(self)
        return plain


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _keys(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield each field but `rest` with its key in the file."""
    for one in fields(kind):
        if not one.metadata.get("rest"):
            yield one.metadata.get("key", one.name), one


def _read(hint: Any, value: Any, place: str, lenient: bool) -> Any:
    """Return `value` if it matches `hint`; else raise ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(args, value, place, lenient)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _read_fields(hint, value, place, lenient)
    if origin is list and isinstance(value, (list, tuple)):
        found = (_try(args[0], v, f"{place}.{i}", lenient) for i, v in enumerate(value))
        return [item for fits, item in found if fits]
    if origin is dict and isinstance(value, Mapping):
        named = ((str(k), _try(args[1], v, f"{place}.{k}", lenient)) for k, v in value.items())
        return {name: item for name, (fits, item) in named if fits}
    if origin is Literal and value in args:
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number and (math.isfinite(value) or not lenient):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    if hint is int and number and isinstance(value, int):
        return value
    raise ValueError(f"{place} is {value!r:.40}, which is not {_name(hint)}")


def _read_union(args: tuple[Any, ...], value: Any, place: str, lenient: bool) -> Any:
    others = [one for one in args if one is not types.NoneType]
    if types.NoneType in args and value is None:
        return None
    for one in others[:-1]:
        fits, found = _try(one, value, place, True)
        if fits:
            return found
    return _read(others[-1], value, place, lenient)


def _try(hint: Any, value: Any, place: str, lenient: bool) -> tuple[bool, Any]:
    """Return whether `value` matches, and the result; a mismatch is an error unless `lenient`."""
    try:
        return True, _read(hint, value, place, lenient)
    except ValueError:
        if not lenient:
            raise
        return False, None


def _read_fields(kind: Any, value: Mapping[str, Any], place: str, lenient: bool) -> Any:
    hints, found, keys = _hints(kind), {}, dict(_keys(kind))
    for key, one in keys.items():
        if key in value and not (value[key] == {} == one.metadata.get("absent")):
            fits, item = _try(hints[one.name], value[key], f"{place}.{key}", lenient)
            if fits:
                found[one.name] = item
    for one in fields(kind):
        if one.metadata.get("rest"):
            others = {key: item for key, item in value.items() if key not in keys}
            found[one.name] = _read(hints[one.name], others, place, True)
    try:
        return kind(**found)
    except TypeError as error:
        raise ValueError(f"{place} is incomplete: {error}") from error


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for one in fields(value):
            item = getattr(value, one.name)
            if one.metadata.get("rest"):
                found |= _plain(item)
            elif item is not None or "absent" in one.metadata:
                found[one.metadata.get("key", one.name)] = (
                    _plain(item) if item is not None else one.metadata["absent"]
                )
        return found
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
