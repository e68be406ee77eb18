"""The processes that share a piece of work: this one alone, or all that a launcher has started.

Imports no torch, so that work of one process needs none; `runtime.distributed.ALL_RANKS` stands for all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class Ranks:
    """What work needs of the processes that share it; as it stands here, for one process."""

    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0

    def world_size(self) -> int:
        """How many processes there are."""
        return 1

    def barrier(self) -> None:
        """Waits until every process is here."""

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        """An error of one process inside becomes the error of all."""
        return nullcontext()

    def on_main(self, do: Callable[[], T]) -> T:
        """What `do` gives on the main process, on each of them."""
        return do()

    def all_gather_dict(self, values: dict[Any, T]) -> dict[Any, T]:
        """The entries of all processes, on each of them."""
        return values


ALONE = Ranks()
