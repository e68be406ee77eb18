"""Adds the place in the recipe (key, file and line) to errors of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rpo_trainer.errors import DataError, Problems, RPOTrainerError

if TYPE_CHECKING:
    from rpo_trainer.recipe.where import Origins


@contextmanager
def errors_located_in(origins: Origins, part: str | None = None) -> Iterator[None]:
    """Add file and line to errors raised inside, and to errors of data the key that names the data.

    Args:
        part: `stages.NAME`, or its `eval`; None: no data is read inside.
    """
    try:
        yield
    except RPOTrainerError as error:
        for one in each(error):
            if part is not None:
                name_part(one, part)
            locate(one, origins)
        raise


def each(error: RPOTrainerError) -> list[RPOTrainerError]:
    """Return the single errors of an error that may combine several."""
    return error.problems if isinstance(error, Problems) else [error]


def name_part(error: RPOTrainerError, part: str) -> None:
    """Prefix the place of an error of data with the key of the recipe that names the data."""
    if not isinstance(error, DataError):
        return
    where = error.where or ""
    if where.startswith("data."):
        error.at(f"{part}.{where}")
    elif not where.startswith(part):
        key = part if part.endswith("eval") else f"{part}.data"
        error.at(f"{key}: {where}" if where else key)


def locate(error: RPOTrainerError, origins: Origins) -> None:
    """Add file and line to the key of the recipe that an error names."""
    if error.where is not None:
        error.at(origins.locate(error.where))
