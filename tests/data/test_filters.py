from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.errors import DataError


def row(i: int, *rewards: float, truth: bool = False) -> dict[str, Any]:
    return {
        "id": f"r{i}",
        "responses": ["x"] * len(rewards),
        "rewards": list(rewards) or None,
        "truth_chosen": truth,
    }


def spec(**fields: Any) -> Any:
    base = {"min_chosen_reward": None, "min_gap": None, "ties": "keep", "reversed": "error"}
    return SimpleNamespace(**{**base, **fields})


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
    assert len(filter_rows(one_in_200, None, audit)) == 199  # no filter: the same default
    assert audit.dropped["reversed"].count == 2
    more = [row(i, 2, 1) for i in range(198)] + [row(198, 1, 2)]
    with pytest.raises(DataError, match="1 of 199 rows, first r198"):
        filter_rows(more, spec(), audit)
    assert len(filter_rows(more, spec(reversed="drop"), audit)) == 198
    assert len(filter_rows(more, spec(reversed="keep"), audit)) == 199


def test_rows_without_rewards_pass_unless_a_threshold_needs_them(audit: Audit) -> None:
    rows = [row(0), row(1, 2, 1)]
    assert len(filter_rows(rows, spec(ties="drop"), audit)) == 2
    with pytest.raises(DataError, match=r"the filter needs rewards.*: 1 of 2 rows, first r0"):
        filter_rows(rows, spec(min_gap=0.5), audit)


def test_nothing_left(audit: Audit) -> None:
    with pytest.raises(DataError, match="leaves none of the 1 rows"):
        filter_rows([row(0, 2, 1)], spec(min_chosen_reward=9.0), audit)
