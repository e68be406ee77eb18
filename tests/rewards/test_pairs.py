"""Scored responses become preference rows; what is dropped is counted by reason."""

from __future__ import annotations

from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.errors import DataError
from rpo_trainer.rewards.pairs import make_preference_rows
from tests.raising import raises


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


def test_thinking_stays_with_its_response_and_tells_it_from_another() -> None:
    fields = [{"thinking": "bad"}, {"thinking": "good"}, {"thinking": "good"}, {}]
    given = {**row(["a", "a", "a", "b"], [1.0, 5.0, 4.0, 3.0]), "response_fields": fields}
    (made,) = make_preference_rows([given], select="all_responses", audit=Audit())
    assert made["responses"] == ["a", "b", "a"]
    assert made["response_fields"] == [{"thinking": "good"}, {}, {"thinking": "bad"}]
    (made,) = make_preference_rows([given], select="best_worst", audit=Audit())
    assert made["response_fields"] == [{"thinking": "good"}, {"thinking": "bad"}]


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
    with raises("rewards.incomplete", DataError) as error:
        make_preference_rows(rows, select="best_worst", min_gap=0.0, audit=Audit())
    assert "1 of 2" in error.value.what


def made(rows: list[dict[str, Any]], **settings: Any) -> tuple[list[Any], dict[str, int]]:
    audit = Audit()
    found = make_preference_rows(rows, audit=audit, **settings)
    return [(r["responses"], r["rewards"]) for r in found], counts(audit, "dropped")


def test_all_pairs_of_unequal_rewards() -> None:
    rows = [row(["b", "a", "c"], [2.0, 3.0, 2.0]), row(["x", "y"], [1.0, 1.0])]
    audit = Audit()
    found = make_preference_rows(rows, select="all_pairs", audit=audit)
    assert [(r["id"], r["responses"], r["rewards"]) for r in found] == [
        ("r1/1", ["a", "b"], [3.0, 2.0]),
        ("r1/2", ["a", "c"], [3.0, 2.0]),
    ]
    assert counts(audit, "dropped") == {"tie": 1}
    wide, dropped = made([row(["a", "b", "c"], [3.0, 2.0, 0.0])], select="all_pairs", min_gap=1.0)
    assert [rewards for _, rewards in wide] == [[3.0, 0.0], [2.0, 0.0]] and dropped == {}


def test_best_against_a_random_worse_one() -> None:
    texts, rewards = ["w1", "best", "w2", "w3", "equal"], [0.0, 5.0, 1.0, 2.0, 5.0]
    rows = [{**row(texts, rewards), "id": f"r{i}"} for i in range(200)]
    found, _ = made(rows, select="best_random", seed=1)
    assert {responses[0] for responses, _ in found} == {"best"}
    rejected = [responses[1] for responses, _ in found]
    assert {*rejected} == {"w1", "w2", "w3"}
    assert all(40 < rejected.count(text) < 95 for text in ("w1", "w2", "w3"))
    assert made(rows, select="best_random", seed=1)[0] == found
    assert made(rows, select="best_random", seed=2)[0] != found
    # The draw of a row does not depend on other rows.
    assert made(rows[50:60], select="best_random", seed=1)[0] == found[50:60]


def test_ground_truth_as_chosen_where_there_is_one() -> None:
    rows = [
        row(["better", "truth ", "worse"], [3.0, 2.0, 1.0], truth="truth"),
        row(["a", "b"], [0.0, 1.0], truth="not among them"),
        row(["a", "b"], [0.0, 1.0]),
        row(["a", "truth"], [1.0, 0.0], truth="truth"),
    ]
    audit = Audit()
    found = make_preference_rows(rows, chosen="ground_truth", audit=audit)
    assert [(r["responses"], r["truth_chosen"]) for r in found] == [
        (["truth ", "worse"], True),
        (["b", "a"], False),
        (["b", "a"], False),
    ]
    assert counts(audit, "dropped") == {"reversed": 1}
    assert counts(audit, "warnings") == {"truth_not_chosen": 1}
    (whole, *_), _ = made(rows[:1], chosen="ground_truth", select="all_responses")
    assert whole == (["truth ", "better", "worse"], [2.0, 3.0, 1.0])


def test_ties_may_be_kept() -> None:
    tied = [row(["a", "b"], [1.0, 1.0])]
    assert made(tied, ties="keep")[0] == [(["a", "b"], [1.0, 1.0])]
    assert made(tied, ties="drop") == ([], {"tie": 1})
    assert made(tied, ties="keep", select="best_random")[0] == [(["a", "b"], [1.0, 1.0])]


def test_ranked_rows_have_an_order_and_no_rewards() -> None:
    ranked = [{**row(["1st", "2nd", "3rd"], []), "rewards": None}]
    assert made(ranked)[0] == [(["1st", "3rd"], None)]
    assert made(ranked, select="all_responses")[0] == [(["1st", "2nd", "3rd"], None)]
    assert len(made(ranked, select="all_pairs", min_gap=5.0)[0]) == 3


def test_what_a_judge_left_undecided_is_left_out() -> None:
    rows = [
        {**row(["a", "b", "c"], [1.0, None, 0.0]), "judge": []},
        {**row(["a", "b"], [None, None]), "judge": []},
    ]
    audit = Audit()
    found = make_preference_rows(rows, audit=audit)
    assert [r["responses"] for r in found] == [["a", "c"]]
    assert counts(audit, "dropped") == {"no_verdict": 1}
    assert counts(audit, "warnings") == {"undecided_responses_removed": 2}


def test_tools_stay_with_the_row() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (found,) = make_preference_rows(
        [{**row(["a", "b"], [1.0, 0.0]), "tools": tools}], audit=Audit()
    )
    assert found["tools"] == tools
