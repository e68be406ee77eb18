"""Verifiers that compare texts: exact, partial match, multiple choice, regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.errors import RecipeError
from rpo_trainer.rewards.verifiers.base import SECONDS, Check, Verifier, ground_truth, required

_RIGHT, _WRONG_AT_MOST = 5.0, 4.0


def _exact(row: Row) -> Check:
    """1 for the right answer, 0 for any other; white space at the ends does not count."""
    truth = ground_truth(row)
    return lambda response: float(response.strip() == truth)


def _partial_match(row: Row) -> Check:
    """5 for the right answer, else 4 times the share of characters that are right, in [0, 4).

    The share is the number of positions at which both texts have the same character, divided by
    the length of the longer text.
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
# From the plainest statement of an answer to the least plain; of several, the last one counts.
# They read texts whose runs of white space are one blank: two `\s*` that meet in a long run would
# take a time that is quadratic in its length.
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
    """1 where the chosen letter is the right one, 0 else, and where no choice can be found.

    `ground_truth` is the letter, or the text of one of the row's `choices`. A response states its
    choice as \\boxed{B}, "the answer is B", with the letter in front, as "(B)", or by the text of
    the choice alone.
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
    """A letter alone ("B", "(b)", "B."), or the letter of the choice with this text."""
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
    """1 where the row's `pattern` is found in the response, 0 else; `^` and `$` anchor it.

    A search that takes longer than `SECONDS` raises TimeoutError: the reward is 0.
    """
    try:
        import regex
    except ImportError:
        raise missing_library("regex", "regex") from None
    pattern = required(row, "pattern")
    if pattern == "":
        raise RowError(
            "`pattern` is empty: it would be found everywhere", code="verifier.bad-pattern"
        )
    try:
        compiled = regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise RowError(
            f"`pattern` is no regular expression ({error})", code="verifier.bad-pattern"
        ) from None

    return lambda response: float(compiled.search(response, timeout=SECONDS) is not None)


def missing_library(verifier: str, library: str) -> RecipeError:
    """The error of a verifier whose library is not installed."""
    return RecipeError(
        f"the verifier '{verifier}' needs the library {library}",
        code="recipe.missing-library",
        why="it is not installed: only some verifiers need more than the package itself",
        fix="pip install 'rpo-trainer[verifiers]'",
    )


EXACT = Verifier("exact", 1.0, ("ground_truth",), _exact)
PARTIAL_MATCH = Verifier("partial_match", _RIGHT, ("ground_truth",), _partial_match)
MULTIPLE_CHOICE = Verifier("multiple_choice", 1.0, ("ground_truth", "choices"), _multiple_choice)
REGEX = Verifier("regex", 1.0, ("pattern",), _regex)
