"""Processes that share work: a single one, or all that a launcher has started.

torch is not imported here; `runtime.distributed.ALL_RANKS` has the implementation for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class Ranks:
    """Interface to the processes that share work; this class is for a single process."""

    def rank(self) -> int:
        """Return the rank of this process, from 0."""
        return 0

    def world_size(self) -> int:
        """Return the number of processes."""
        return 1

    def barrier(self) -> None:
        """Wait for all processes."""

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        """Raise an error of one process inside on all processes."""
        return nullcontext()

    def on_main(self, do: Callable[[], T]) -> T:
        """Return the result of `do` on the main process, on all processes."""
        return do()

    def all_gather_dict(self, values: dict[Any, T]) -> dict[Any, T]:
        """Merge the dicts of all processes on each of them."""
        return values


ALONE = Ranks()
