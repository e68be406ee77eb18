from __future__ import annotations

from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import FilterSpec
from tests.raising import raises


def row(i: int, *rewards: float, truth: bool = False) -> dict[str, Any]:
    return {
        "id": f"r{i}",
        "responses": ["x"] * len(rewards),
        "rewards": list(rewards) or None,
        "truth_chosen": truth,
    }


def spec(**fields: Any) -> FilterSpec:
    return FilterSpec(**fields)


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [r["id"] for r in rows]


def test_chosen_reward_with_ground_truth_passing(audit: Audit) -> None:
    rows = [row(0, 4, 1), row(1, 3.9, 1), row(2, 1, 0, truth=True)]
    assert ids(filter_rows(rows, spec(min_chosen_reward=4.0), audit)) == ["r0", "r2"]
    assert audit.dropped["low_chosen_reward"].as_dict() == {"count": 1, "examples": ["r1"]}


def test_gap_is_best_less_worst_and_the_threshold_itself_passes(audit: Audit) -> None:
    rows = [row(0, 2, 1), row(1, 2, 1.5), row(2, 3, 2.9, 2.0)]
    assert ids(filter_rows(rows, spec(min_gap=1.0), audit)) == ["r0", "r2"]
    assert audit.dropped["small_gap"].count == 1


def test_ties(audit: Audit) -> None:
    rows = [row(0, 1, 1), row(1, 2, 1), row(2, 1, 1, 1)]
    assert len(filter_rows(rows, spec(), audit)) == 3
    assert ids(filter_rows(rows, spec(ties="drop"), audit)) == ["r1"]
    assert audit.dropped["tie"].count == 2


def test_reversed_pairs(audit: Audit) -> None:
    one_in_200 = [row(i, 2, 1) for i in range(199)] + [row(199, 1, 2)]
    assert len(filter_rows(one_in_200, spec(), audit)) == 199
    assert len(filter_rows(one_in_200, None, audit)) == 199  # the default without a filter
    assert audit.dropped["reversed"].count == 2
    more = [row(i, 2, 1) for i in range(198)] + [row(198, 1, 2)]
    with raises("data.reversed-pairs", DataError) as error:
        filter_rows(more, spec(), audit)
    assert "1 of 199 rows, first r198" in error.value.what
    assert len(filter_rows(more, spec(reversed="drop"), audit)) == 198
    assert len(filter_rows(more, spec(reversed="keep"), audit)) == 199


def test_rows_without_rewards_pass_unless_a_threshold_needs_them(audit: Audit) -> None:
    rows = [row(0), row(1, 2, 1)]
    assert len(filter_rows(rows, spec(ties="drop"), audit)) == 2
    with raises("data.missing-rewards", DataError, rows=["r0"], of=2):
        filter_rows(rows, spec(min_gap=0.5), audit)


def test_nothing_left(audit: Audit) -> None:
    with raises("data.no-rows-left", DataError) as error:
        filter_rows([row(0, 2, 1)], spec(min_chosen_reward=9.0), audit)
    assert " 1 rows" in error.value.what


def chosen_rows(*rewards: float, truth: int | None = None) -> list[dict[str, Any]]:
    return [row(i, reward, -1.0, truth=i == truth) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("fields", "kept", "threshold"),
    [
        ({"min_chosen_reward": 3.0}, "r0 r2 r3", 3.0),
        ({"min_chosen_quantile": 0.75}, "r2 r3", 4.0),  # equal to the last of the best quarter
        ({"min_chosen_quantile": 0.0}, "r0 r1 r2 r3", 1.0),
        ({"keep_top_fraction": 0.25}, "r2", 4.0),  # the earlier of equal ones
        ({"keep_top_fraction": 0.5}, "r2 r3", 4.0),
        ({"keep_top_fraction": 0.01}, "r2", 4.0),  # at least one
        ({"keep_top_fraction": 1.0}, "r0 r1 r2 r3", 1.0),
    ],
)
def test_the_chosens_quality(fields: Any, kept: str, threshold: float) -> None:
    audit = Audit()
    passed = filter_rows(chosen_rows(3.0, 1.0, 4.0, 4.0), spec(**fields), audit)
    assert [each["id"] for each in passed] == kept.split()
    assert audit.filter == {"rows": 4, "passed": len(passed), "min_chosen_reward": threshold}
    assert any(
        line.startswith(f"filter: {len(passed)} of 4 rows") for line in audit.summary_lines()
    )
    assert audit.as_dict()["filter"] == audit.filter


@pytest.mark.parametrize(
    "fields",
    [{"min_chosen_reward": 4.0}, {"min_chosen_quantile": 0.9}, {"keep_top_fraction": 0.25}],
)
def test_a_chosen_that_is_ground_truth_always_passes(fields: Any) -> None:
    passed = filter_rows(chosen_rows(3.0, 1.0, 5.0, truth=1), spec(**fields), Audit())
    assert [each["id"] for each in passed] == ["r1", "r2"]


def test_the_threshold_is_taken_among_rows_that_pass_all_else() -> None:
    rows = [row(0, 9.0, 9.0), row(1, 5.0, 1.0), row(2, 3.0, 1.0)]
    audit = Audit()
    passed = filter_rows(rows, spec(ties="drop", keep_top_fraction=0.5), audit)
    assert [each["id"] for each in passed] == ["r1"]
    assert {reason: count.count for reason, count in audit.dropped.items()} == {
        "tie": 1,
        "chosen_not_in_top": 1,
    }
