"""Rewards from a known answer."""

from __future__ import annotations

import pytest

from rpo_trainer.errors import DataError, RecipeError
from rpo_trainer.rewards.verifiers import VERIFIERS, get_verifier, score_rows


@pytest.mark.parametrize(
    ("response", "reward"),
    [("42", 1), (" 42\n", 1), ("42.", 0), ("", 0), ("4 2", 0), ("Forty-two", 0)],
)
def test_exact_is_one_for_the_right_answer_only(response: str, reward: float) -> None:
    assert get_verifier("exact")(response, "42 ") == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("abcd", 5.0),
        (" abcd ", 5.0),
        ("abdc", 4 * 2 / 4),  # two letters swapped
        ("abc", 4 * 3 / 4),  # the last letter lost
        ("abcde", 4 * 4 / 5),  # one too many: divided by the longer text
        ("bcda", 0.0),
        ("", 0.0),
        ("ABCD", 0.0),
    ],
)
def test_partial_match_is_four_times_the_share_of_right_places(
    response: str, reward: float
) -> None:
    assert get_verifier("partial_match")(response, "abcd") == pytest.approx(reward)


def test_partial_match_of_a_wrong_answer_stays_below_a_right_one() -> None:
    truth = "x" * 1000
    assert get_verifier("partial_match")(truth + "y", truth) < 4.0
    assert get_verifier("partial_match").maximum == 5.0


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("truth", [None, "", " "])
def test_no_ground_truth_is_an_error_and_never_a_reward(name: str, truth: str | None) -> None:
    with pytest.raises(DataError, match="no ground_truth"):
        get_verifier(name)("anything", truth)


def test_unknown_verifier_is_named_with_the_nearest_known() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'partial_match'\?"):
        get_verifier("partialmatch")


def test_score_rows_gives_one_reward_a_response_and_leaves_its_input() -> None:
    rows = [{"id": "a", "ground_truth": "12", "responses": ["12", "13", "7"]}]
    (scored,) = score_rows(rows, get_verifier("partial_match"))
    assert scored["rewards"] == [5.0, 2.0, 0.0]
    assert "rewards" not in rows[0]


def test_score_rows_counts_all_rows_without_ground_truth() -> None:
    rows = [{"id": f"row-{i}", "responses": ["x"], "ground_truth": None} for i in range(5)]
    rows.append({"id": "good", "responses": ["x"], "ground_truth": "x"})
    with pytest.raises(DataError, match="5 of 6 rows") as error:
        score_rows(rows, get_verifier("exact"))
    assert error.value.where == "rows row-0, row-1, row-2"
