"""Errors of a stage say where in the recipe they come from: part, file and line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rpo_trainer.errors import DataError, Problems, RPOTrainerError

if TYPE_CHECKING:
    from rpo_trainer.recipe.where import Origins


@contextmanager
def errors_located_in(origins: Origins, part: str | None = None) -> Iterator[None]:
    """Errors raised inside get file and line, and errors of data the part of the recipe that names the data.

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
    """The errors that are one, or several at once."""
    return error.problems if isinstance(error, Problems) else [error]


def name_part(error: RPOTrainerError, part: str) -> None:
    """Puts the part of the recipe that names the data before the place that an error of data has."""
    if not isinstance(error, DataError):
        return
    where = error.where or ""
    if where.startswith("data."):
        error.at(f"{part}.{where}")
    elif not where.startswith(part):
        key = part if part.endswith("eval") else f"{part}.data"
        error.at(f"{key}: {where}" if where else key)


def locate(error: RPOTrainerError, origins: Origins) -> None:
    """Puts file and line in place of a key of the recipe."""
    if error.where is not None:
        error.at(origins.locate(error.where))
