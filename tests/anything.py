"""Arbitrary values in arbitrary places, for readers of hand-written files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
# Values that a file is likely to have in the wrong place.
LIKELY = st.sampled_from(
    ["", " ", "x", "user", [], {}, [[]], [None], ["x"], 0, -1, 4.5, float("nan"), 10**400, [Q], [A]]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every nested value."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, below in inner:
        yield (*path, key)
        yield from places(below, (*path, key))


def spoiled(row: dict[str, Any], path: tuple[Any, ...], value: Any, remove: bool) -> dict[str, Any]:
    new = copy.deepcopy(row)
    owner: Any = new
    for key in path[:-1]:
        owner = owner[key]
    if remove:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return new
