"""Verifiers: rewards computed from the reference answers or checks in a row, without a model."""

from __future__ import annotations

from collections.abc import Sequence

from rpo_trainer.data.rows import Row, RowError, RowProblems
from rpo_trainer.errors import RecipeError, suggestion
from rpo_trainer.rewards.verifiers.asserts import ASSERTS
from rpo_trainer.rewards.verifiers.base import FailedChecks, Verifier
from rpo_trainer.rewards.verifiers.instructions import INSTRUCTION_CHECKS
from rpo_trainer.rewards.verifiers.json_schema import JSON_SCHEMA
from rpo_trainer.rewards.verifiers.numeric import NUMERIC
from rpo_trainer.rewards.verifiers.text import EXACT, MULTIPLE_CHOICE, PARTIAL_MATCH, REGEX

__all__ = [
    "VERIFIERS", "FailedChecks", "Verifier", "check_rows", "get_verifier", "score_rows",
]  # fmt: skip

# All verifiers, by name. `VerifierName` in recipe/schema/rewards.py repeats the names: the recipe does
# not import rewards.
VERIFIERS = {
    verifier.name: verifier
    for verifier in (
        EXACT, PARTIAL_MATCH, NUMERIC, MULTIPLE_CHOICE, JSON_SCHEMA, REGEX, INSTRUCTION_CHECKS,
        ASSERTS,
    )
}  # fmt: skip


def get_verifier(name: str, *, allow_code_execution: bool = False) -> Verifier:
    """Return the verifier with this name, one of `VERIFIERS`.

    Raises:
        RecipeError: the name is unknown, or the verifier executes code and that is not allowed.
    """
    if name not in VERIFIERS:
        raise RecipeError(
            f"unknown verifier '{name}'{suggestion(name, VERIFIERS)}",
            code="verifier.unknown",
            why="each verifier applies a different rule",
            fix=f"use one of: {', '.join(VERIFIERS)}",
        )
    if VERIFIERS[name].runs_code and not allow_code_execution:
        raise RecipeError(
            f"the verifier '{name}' executes model-written code",
            code="recipe.code-execution-not-allowed",
            why="that code may be harmful; its sandbox has limits but is not a security boundary",
            fix="set allow_code_execution: true (--allow-code-execution), preferably in a container",
        )
    return VERIFIERS[name]


def score_rows(rows: Sequence[Row], verifier: Verifier) -> list[Row]:
    """Return the rows with `rewards`, one for each of their `responses`.

    Responses whose check fails get the reward 0; a warning counts them.

    Raises:
        DataError, or Problems: rows cannot be verified; all are counted, the first three of each kind are
            listed.
    """
    problems = RowProblems()
    failed = FailedChecks()
    scored = []
    for row in rows:
        try:
            check = verifier.prepare(row, failed)
            scored.append({**row, "rewards": [check(response) for response in row["responses"]]})
        except RowError as error:
            problems.add(error, str(row["id"]))
    failed.warn(verifier.name)
    _raise(problems, len(rows), verifier)
    return scored


def check_rows(rows: Sequence[Row], verifier: Verifier) -> None:
    """Raise the errors of `score_rows` before responses are sampled."""
    problems = RowProblems()
    for row in rows:
        try:
            verifier.prepare(row)
        except RowError as error:
            problems.add(error, str(row["id"]))
    _raise(problems, len(rows), verifier)


def _raise(problems: RowProblems, total: int, verifier: Verifier) -> None:
    problems.where = f"verifier '{verifier.name}'"
    problems.raise_if_any(
        total,
        fix=f"add the columns it reads ({', '.join(verifier.columns)}), or remove these rows",
    )
