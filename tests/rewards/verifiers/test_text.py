"""Multiple choice and regular expressions."""

from __future__ import annotations

from typing import Any

import pytest

from rpo_trainer.rewards.verifiers import get_verifier
from tests.rewards.failing import unverifiable

CHOICES = ["Paris", "London", "a city", "The Hague"]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("B", True),
        ("(b)", True),
        ("B.", True),
        ("B) London", True),
        ("B: because it is", True),
        ("The answer is B", True),
        ("The answer is (B).", True),
        ("Answer: B", True),
        ("the correct answer is option B", True),
        ("My final choice: **B**", True),
        (r"Since it is so, \boxed{B}.", True),
        (r"\boxed{\text{B}}", True),
        ("At first I thought (A), but it is (B)", True),
        ("The answer is A. No, the answer is B", True),
        ("london", True),
        ("A", False),
        ("The answer is (C)", False),
        ("A city is meant, so the answer is C", False),
        ("I would say London is not A city", False),  # an article is not a choice
        ("", False),
        ("I don't know", False),
        ("Between B and C I cannot choose", False),
    ],
)
def test_multiple_choice(response: str, right: bool) -> None:
    check = get_verifier("multiple_choice")
    assert check(response, {"ground_truth": "B", "choices": CHOICES}) == float(right)
    assert check(response, {"ground_truth": "london", "choices": CHOICES}) == float(right)


def test_letters_without_the_texts() -> None:
    check = get_verifier("multiple_choice")
    assert check("The answer is (D)", {"ground_truth": "(D)"}) == 1.0
    assert check("London", {"ground_truth": "B"}) == 0.0


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"ground_truth": "Rome", "choices": CHOICES}, "verifier.bad-ground-truth"),
        ({"ground_truth": "B", "choices": "A B C"}, "verifier.bad-column"),
        ({"ground_truth": "B", "choices": [1, 2]}, "verifier.bad-column"),
    ],
)
def test_multiple_choice_that_cannot_be_verified(row: dict[str, Any], code: str) -> None:
    with unverifiable(code):
        get_verifier("multiple_choice").prepare(row)


def test_regex_is_searched_for() -> None:
    check = get_verifier("regex")
    assert check("on 2024-05-17.", {"pattern": r"\d{4}-\d\d-\d\d"}) == 1.0
    assert check("on 2024-05-17.", {"pattern": r"^\d{4}-\d\d-\d\d$"}) == 0.0
    assert check("YES", {"pattern": "(?i)yes"}) == 1.0


@pytest.mark.parametrize("pattern", ["(", 5])
def test_what_is_no_pattern(pattern: Any) -> None:
    with unverifiable("verifier.bad-pattern"):
        get_verifier("regex").prepare({"pattern": pattern})


def test_a_search_that_takes_too_long_gives_0(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rpo_trainer.rewards.verifiers.text.SECONDS", 0.05)
    check = get_verifier("regex").prepare({"pattern": r"^(\w|\w\w)+$"})
    assert check("a" * 200 + "!") == 0.0
    assert check("aaa") == 1.0
    assert "TimeoutError" in caplog.text
