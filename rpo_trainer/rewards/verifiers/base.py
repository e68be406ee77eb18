"""What every verifier is: a row gives a check, and the check gives a response its reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rpo_trainer.data.rows import Row, RowError

Check = Callable[[str], float]


@dataclass(frozen=True)
class Verifier:
    """Rewards computed from what a row says about right answers.

    Attributes:
        name: its name in recipes and on the command line.
        maximum: the reward of a right answer, and of nothing else.
        columns: what it reads of a row, the first of them required.
        prepare: row → reward of a response; raises RowError where the row cannot be verified.
    """

    name: str
    maximum: float
    columns: tuple[str, ...]
    prepare: Callable[[Row], Check]

    def __call__(self, response: str, row: Row) -> float:
        """The reward of one response. Raises RowError: the row cannot be verified."""
        return self.prepare(row)(response)


def ground_truth(row: Row) -> str:
    """The row's right answer, without white space at its ends. Raises RowError without one."""
    value = row.get("ground_truth")
    if not isinstance(value, str) or not value.strip():
        raise RowError("no ground_truth to compare the responses with")
    return value.strip()


def required(row: Row, column: str) -> Any:
    """A column that must be there. Raises RowError."""
    if row.get(column) is None:
        raise RowError(f"`{column}` is absent or null")
    return row[column]
