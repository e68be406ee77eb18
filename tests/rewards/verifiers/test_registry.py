"""Properties of all verifiers, and the two that compare characters."""

from __future__ import annotations

from typing import get_args

import pytest

from rpo_trainer.data.rows import RowError
from rpo_trainer.errors import DataError, Problems, RecipeError
from rpo_trainer.recipe import ScoreSpec
from rpo_trainer.rewards.verifiers import VERIFIERS, check_rows, get_verifier, score_rows
from tests.raising import codes_of, raises, with_code


@pytest.mark.parametrize(
    ("response", "reward"),
    [("42", 1), (" 42\n", 1), ("42.", 0), ("", 0), ("4 2", 0), ("Forty-two", 0)],
)
def test_exact_is_one_for_the_right_answer_only(response: str, reward: float) -> None:
    assert get_verifier("exact")(response, {"ground_truth": "42 "}) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("abcd", 5.0),
        (" abcd ", 5.0),
        ("abdc", 4 * 2 / 4),  # two letters swapped
        ("abc", 4 * 3 / 4),  # the last letter missing
        ("abcde", 4 * 4 / 5),  # one too many: divided by the longer text
        ("bcda", 0.0),
        ("", 0.0),
        ("ABCD", 0.0),
    ],
)
def test_partial_match_is_four_times_the_share_of_right_places(
    response: str, reward: float
) -> None:
    check = get_verifier("partial_match")
    assert check(response, {"ground_truth": "abcd"}) == pytest.approx(reward)


def test_partial_match_of_a_wrong_answer_stays_below_a_right_one() -> None:
    truth = "x" * 1000
    assert get_verifier("partial_match")(truth + "y", {"ground_truth": truth}) < 4.0
    assert get_verifier("partial_match").maximum == 5.0


def test_a_recipe_knows_the_verifiers_of_the_table() -> None:
    (names, _) = get_args(ScoreSpec.model_fields["verifier"].annotation)
    assert get_args(names) == (*VERIFIERS,)


def test_what_runs_code_is_marked() -> None:
    assert [name for name, verifier in VERIFIERS.items() if verifier.runs_code] == ["asserts"]


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("value", [None, "", " ", 7])
def test_a_row_without_what_is_needed_is_an_error_and_never_a_reward(
    name: str, value: object
) -> None:
    verifier = get_verifier(name, allow_code_execution=True)
    with pytest.raises(RowError):
        verifier("anything", dict.fromkeys(verifier.columns, value) if value != " " else {})


def test_unknown_verifier_is_named_with_the_nearest_known() -> None:
    with raises("verifier.unknown", RecipeError) as error:
        get_verifier("partialmatch")
    assert "`partial_match`" in error.value.what


def test_code_is_not_run_unless_asked_for() -> None:
    with raises("recipe.code-execution-not-allowed", RecipeError) as error:
        get_verifier("asserts")
    assert "--allow-code-execution" in str(error.value)


def test_score_rows_gives_one_reward_a_response_and_leaves_its_input() -> None:
    rows = [{"id": "a", "ground_truth": "12", "responses": ["12", "13", "7"]}]
    (scored,) = score_rows(rows, get_verifier("partial_match"))
    assert scored["rewards"] == [5.0, 2.0, 0.0]
    assert "rewards" not in rows[0]


def test_all_rows_that_cannot_be_verified_are_counted() -> None:
    rows = [{"id": f"row-{i}", "responses": ["x"], "ground_truth": None} for i in range(5)]
    rows.append({"id": "good", "responses": ["x"], "ground_truth": "x"})
    for work in (score_rows, check_rows):
        where = "verifier 'exact'"
        with raises("verifier.missing-ground-truth", DataError, where=where) as error:
            work(rows, get_verifier("exact"))
        assert "5 of 6 rows, first row-0, row-1, row-2" in error.value.what
        assert "(ground_truth)" in str(error.value.fix)


def test_faults_of_several_kinds_come_together() -> None:
    rows = [
        {"id": "a", "responses": [], "ground_truth": "no number"},
        {"id": "b", "responses": [], "ground_truth": None},
        {"id": "c", "responses": [], "ground_truth": "5"},
    ]
    with raises("verifier.bad-ground-truth", Problems) as error:
        check_rows(rows, get_verifier("numeric"))
    assert codes_of(error.value) == ["verifier.bad-ground-truth", "verifier.missing-ground-truth"]
    named = with_code(error.value, "verifier.bad-ground-truth").what
    assert named.endswith("1 of 3 rows, first a")
