"""Rewards computed from a known right answer: no reward model, no judge.

Both verifiers compare after stripping white space at both ends, and are case-sensitive.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rpo_trainer.errors import DataError, RecipeError

_RIGHT, _WRONG_AT_MOST = 5.0, 4.0


@dataclass(frozen=True)
class Verifier:
    """A reward for a response given the right answer.

    Called with `(response, ground_truth)`; `maximum` is the reward of a right answer and of
    nothing else.
    """

    name: str
    maximum: float
    score: Callable[[str, str], float]

    def __call__(self, response: str, ground_truth: str | None) -> float:
        """The reward of one response.

        Raises:
            DataError: there is no ground truth to compare with.
        """
        return self.score(response.strip(), _truth(ground_truth, self.name))


def get_verifier(name: str) -> Verifier:
    """The verifier of that name, one of `VERIFIERS`.

    Raises:
        RecipeError: there is no such verifier.
    """
    if name not in VERIFIERS:
        raise RecipeError(
            f"unknown verifier '{name}'{nearest(name, VERIFIERS)}",
            fix=f"use one of: {', '.join(VERIFIERS)}",
        )
    return VERIFIERS[name]


def score_rows(rows: Sequence[dict[str, Any]], verifier: Verifier) -> list[dict[str, Any]]:
    """The rows with `rewards`, one for each of their `responses`.

    Raises:
        DataError: rows without `ground_truth`; all are counted, the first three are named.
    """
    require_ground_truth(rows, verifier)
    return [
        {
            **row,
            "rewards": [verifier(response, row["ground_truth"]) for response in row["responses"]],
        }
        for row in rows
    ]


def require_ground_truth(rows: Sequence[dict[str, Any]], verifier: Verifier) -> None:
    """Raises what `score_rows` would, before time is spent on sampling responses."""
    missing = [row["id"] for row in rows if not _is_truth(row.get("ground_truth"))]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} rows have no ground_truth",
            where=f"rows {', '.join(map(str, missing[:3]))}",
            why=f"the verifier '{verifier.name}' compares each response with it",
            fix="add the column ground_truth, or give rewards with the data",
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _exact(response: str, truth: str) -> float:
    """1 for the right answer, 0 for any other."""
    return float(response == truth)


def _partial_match(response: str, truth: str) -> float:
    """5 for the right answer, else 4 times the share of characters that are right, in [0, 4).

    The share is the number of positions at which both texts have the same character, divided by
    the length of the longer text.
    """
    if response == truth:
        return _RIGHT
    same = sum(a == b for a, b in zip(response, truth, strict=False))
    return _WRONG_AT_MOST * same / max(len(response), len(truth))


def _is_truth(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _truth(ground_truth: str | None, verifier: str) -> str:
    if ground_truth is None or not _is_truth(ground_truth):
        raise DataError(
            "no ground_truth to compare a response with",
            where=f"verifier '{verifier}'",
            fix="add the column ground_truth to the rows",
        )
    return ground_truth.strip()


VERIFIERS = {
    "exact": Verifier("exact", 1.0, _exact),
    "partial_match": Verifier("partial_match", _RIGHT, _partial_match),
}
