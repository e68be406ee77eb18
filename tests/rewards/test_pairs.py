"""Scored responses become preference rows; what is dropped is counted by reason."""

from __future__ import annotations

from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.pairs import make_preference_rows


def row(responses: list[str], rewards: list[Any], truth: str | None = None) -> dict[str, Any]:
    return {
        "id": "r1",
        "source": "here",
        "prompt": "p",
        "responses": responses,
        "rewards": rewards,
        "ground_truth": truth,
    }


def test_best_against_worst() -> None:
    (made,) = make_preference_rows(
        [row(["b", "a", "d", "c"], [3.0, 5.0, 0.5, 1.0], truth="a")],
        select="best_worst",
        min_gap=0.0,
        audit=Audit(),
    )
    assert made == {
        "id": "r1",
        "source": "here",
        "prompt": "p",
        "responses": ["a", "d"],
        "rewards": [5.0, 0.5],
        "ground_truth": "a",
        "truth_chosen": True,
    }


def test_all_responses_best_first_without_repeats() -> None:
    rows = [
        row(["b", "a", "b", "c"], [3.0, 5.0, 3.0, 1.0]),
        row(["b", "a", "d", "c"], [3.0, 3.0, 0.5, 1.0]),
    ]
    made = make_preference_rows(rows, select="all_responses", min_gap=0.0, audit=Audit())
    assert [(each["responses"], each["rewards"]) for each in made] == [
        (["a", "b", "c"], [5.0, 3.0, 1.0]),
        (["b", "a", "c", "d"], [3.0, 3.0, 1.0, 0.5]),  # equal rewards keep their order
    ]
    assert not made[0]["truth_chosen"]


def test_the_first_of_equal_worst_is_rejected() -> None:
    (made,) = make_preference_rows(
        [row(["x", "a", "y"], [0.0, 1.0, 0.0])], select="best_worst", min_gap=0.0, audit=Audit()
    )
    assert made["responses"] == ["a", "x"]


@pytest.mark.parametrize("select", ["best_worst", "all_responses"])
def test_rows_without_a_preference_are_dropped_and_counted(select: Any) -> None:
    rows = [
        row(["a", "b"], [2.0, 2.0]),
        row(["a", "a", "a"], [2.0, 2.0, 2.0]),
        row(["a", " ", ""], [2.0, 0.0, 0.0]),
        row(["a", "b"], [2.0, 1.5]),
        row(["a", "b"], [2.0, 1.4]),
    ]
    audit = Audit()
    made = make_preference_rows(rows, select=select, min_gap=0.5, audit=audit)
    assert [each["rewards"] for each in made] == [[2.0, 1.4]]
    assert counts(audit, "dropped") == {
        "tie": 1,
        "fewer_than_two_responses": 2,
        "small_gap": 1,
    }
    assert counts(audit, "warnings") == {
        "blank_responses_removed": 1,
        "duplicate_responses_removed": 1,
    }


def counts(audit: Audit, what: str) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in audit.as_dict()[what].items()}


@pytest.mark.parametrize(
    "rewards", [None, [1.0], [1.0, None], [1.0, float("nan")], [1.0, float("inf")], [1.0, True]]
)
def test_rewards_that_are_no_numbers_are_an_error_and_never_a_default(rewards: Any) -> None:
    rows = [row(["a", "b"], [1.0, 0.0]), row(["a", "b"], rewards)]
    with pytest.raises(DataError, match="1 of 2 rows"):
        make_preference_rows(rows, select="best_worst", min_gap=0.0, audit=Audit())
