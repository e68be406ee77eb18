"""Lists of numbers of different lengths in two arrays, instead of a Python object for each number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np


class Ragged(Sequence[list[float]]):
    """A sequence of lists of numbers.

    Args:
        values: `[Σ lengths]`, the numbers of all lists.
        lengths: `[n]`, the length of each list.
    """

    def __init__(self, values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        self.values = values
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> list[float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[float]]: ...

    def __getitem__(self, index: int | slice) -> list[float] | list[list[float]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"list {index} of {len(self)}")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]].tolist()  # type: ignore[no-any-return]
