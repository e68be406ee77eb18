"""Text verifiers: exact match, partial match, multiple choice, regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import RecipeError
from rpo_trainer.rewards.verifiers.base import SECONDS, Check, Verifier, ground_truth, required

_RIGHT, _WRONG_AT_MOST = 5.0, 4.0


def _exact(row: Row) -> Check:
    """Return 1 for the ground truth, else 0; leading and trailing white space is ignored."""
    truth = ground_truth(row)
    return lambda response: float(response.strip() == truth)


def _partial_match(row: Row) -> Check:
    """Return 5 for the ground truth, else 4 times the fraction of matching characters, in [0, 4).

    The fraction is the number of positions with the same character in both texts, divided by the length
    of the longer one.
    """
    truth = ground_truth(row)

    def check(response: str) -> float:
        response = response.strip()
        if response == truth:
            return _RIGHT
        same = sum(a == b for a, b in zip(response, truth, strict=False))
        return _WRONG_AT_MOST * same / max(len(response), len(truth))

    return check


# ---------------------------------------------------------------- multiple choice

_LETTER = r"\(?\b([A-Za-z])\b\)?"
# From the most to the least explicit statement of an answer; the last match counts. White space is
# collapsed to single blanks first: adjacent `\s*` take quadratic time on long runs.
_STATED = (
    re.compile(r"\\boxed\{ ?(?:\\text\{)? ?" + _LETTER + r" ?\}"),
    re.compile(
        r"\b(?:answer|choice|option)(?: is)? ?[:=]? ?(?:option |choice )?[*_`\"']*"
        r"\(?\b([A-Z])\b(?!')\)?",
        re.IGNORECASE,
    ),
    re.compile(r"\A\W*" + _LETTER + r"(?:[).:,]|\Z)"),
    re.compile(r"\(([A-Za-z])\)"),
)


def _multiple_choice(row: Row) -> Check:
    """Return 1 if the chosen letter is correct, else 0 (also if no choice is found).

    `ground_truth` is the letter, or the text of one of the row's `choices`. A response states its choice as
    \\boxed{B}, "the answer is B", with a leading letter, as "(B)", or by the text of the choice alone.
    """
    choices = _choices(row)
    truth = _letter_of(ground_truth(row), choices)
    if truth is None:
        raise RowError(
            "ground_truth is neither a letter nor one of the `choices`",
            code="verifier.bad-ground-truth",
        )
    return lambda response: float(_chosen(response, choices) == truth)


def _choices(row: Row) -> Sequence[str]:
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise RowError("`choices` is not a list of texts", code="verifier.bad-column")
    return choices


def _letter_of(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of "B", "(b)" or "B.", or the letter of the choice with this text."""
    for index, choice in enumerate(choices):
        if text.strip().casefold() == choice.strip().casefold():
            return chr(ord("A") + index)
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    return alone[1].upper() if alone else None


def _chosen(response: str, choices: Sequence[str]) -> str | None:
    letter = _letter_of(response, choices)
    if letter is not None:
        return letter
    response = " ".join(response.split())
    known = {chr(ord("A") + i) for i in range(len(choices))} if choices else None
    for pattern in _STATED:
        found = [str(m).upper() for m in pattern.findall(response)]
        found = [m for m in found if known is None or m in known]
        if found:
            return found[-1]
    return None


# ---------------------------------------------------------------- regular expression


def _regex(row: Row) -> Check:
    """Return 1 if the row's `pattern` is found in the response, else 0; `^` and `$` anchor it.

    A search that takes longer than `SECONDS` raises TimeoutError: the reward is 0.
    """
    try:
        import regex
    except ImportError:
        raise missing_library("regex", "regex") from None
    pattern = required(row, "pattern")
    if pattern == "":
        raise RowError("`pattern` is empty: it matches everything", code="verifier.bad-pattern")
    try:
        compiled = regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise RowError(
            f"`pattern` is not a regular expression ({error})", code="verifier.bad-pattern"
        ) from None

    return lambda response: float(compiled.search(response, timeout=SECONDS) is not None)


def missing_library(verifier: str, library: str) -> RecipeError:
    """Return the error for a verifier whose library is not installed."""
    return RecipeError(
        f"the verifier '{verifier}' requires {library}, which is not installed",
        code="recipe.missing-library",
        why="only some verifiers use it",
        fix="pip install 'rpo-trainer[verifiers]'",
    )


EXACT = Verifier("exact", 1.0, ("ground_truth",), _exact)
PARTIAL_MATCH = Verifier("partial_match", _RIGHT, ("ground_truth",), _partial_match)
MULTIPLE_CHOICE = Verifier("multiple_choice", 1.0, ("ground_truth", "choices"), _multiple_choice)
REGEX = Verifier("regex", 1.0, ("pattern",), _regex)
