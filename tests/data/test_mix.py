from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.mix import add_replay, mix_sources
from rpo_trainer.errors import DataError
from tests.raising import raises


def rows(name: str, n: int) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i}", "source": name} for i in range(n)]


def counts(blend: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(r["source"] == name for r in blend) for name in {r["source"] for r in blend}}


def test_without_weights_every_row_is_used_once(audit: Audit) -> None:
    a, b = rows("a", 3), rows("b", 5)
    assert mix_sources([("a", a), ("b", b)], [None, None], seed=0, audit=audit) == a + b
    assert audit.left_out == {}


def test_weights_are_exact_shares_of_the_biggest_blend(audit: Audit) -> None:
    pool = [("a", rows("a", 100)), ("b", rows("b", 2000))]
    blend = mix_sources(pool, [0.1, 0.9], seed=1, audit=audit)
    assert counts(blend) == {"a": 100, "b": 900}
    assert len({row["id"] for row in blend}) == 1000
    assert audit.left_out == {"weight": {"b": 1100}}
    assert counts(mix_sources(pool, [1, 9], seed=1, audit=Audit())) == {"a": 100, "b": 900}


def test_mixture_is_a_function_of_the_seed(audit: Audit) -> None:
    pool = [("a", rows("a", 50)), ("b", rows("b", 50))]

    def ids(seed: int) -> list[str]:
        return [row["id"] for row in mix_sources(pool, [1, 3], seed=seed, audit=audit)]

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)


def test_weights_for_some_sources_only(audit: Audit) -> None:
    with raises("data.missing-weight", DataError, where="b"):
        mix_sources([("a", rows("a", 2)), ("b", rows("b", 2))], [1.0, None], seed=0, audit=audit)


def replay(n: int, earlier: int, fraction: float, of: str, audit: Audit, seed: int = 0) -> Any:
    spec = SimpleNamespace(stage="code", fraction=fraction, of=of)
    return add_replay(rows("new", n), rows("code", earlier), spec, seed=seed, audit=audit)


def test_two_percent_of_the_mix_is_two_percent_exactly(audit: Audit) -> None:
    blend = replay(980, 500, 0.02, "mix", audit)
    assert counts(blend) == {"new": 980, "code": 20}
    assert audit.replay["rows"] == 20
    assert counts(replay(196_000, 4000, 0.02, "mix", audit)) == {"new": 196_000, "code": 4000}


@pytest.mark.parametrize("n", [1, 24, 25, 73, 74, 1344, 7319])
def test_replayed_rows_are_rounded_to_the_nearest(n: int, audit: Audit) -> None:
    replayed = len(replay(n, 1000, 0.02, "mix", audit)) - n
    wanted = n * 2 / 98
    assert abs(replayed - wanted) <= 0.5


def test_replay_of_the_source(audit: Audit) -> None:
    assert counts(replay(10, 4436, 0.02, "source", audit)) == {"new": 10, "code": 89}  # 88.72
    assert counts(replay(10, 125, 0.02, "source", audit)) == {"new": 10, "code": 3}  # 2.5


def test_replay_is_without_replacement_and_by_seed(audit: Audit) -> None:
    blend = replay(100, 120, 0.5, "mix", audit)
    assert len({row["id"] for row in blend}) == 200
    assert blend == replay(100, 120, 0.5, "mix", audit)
    assert blend != replay(100, 120, 0.5, "mix", audit, seed=1)


def test_too_few_rows_to_replay(audit: Audit) -> None:
    with raises("data.replay-too-large", DataError) as error:
        replay(980, 19, 0.02, "mix", audit)
    assert all(word in error.value.what for word in (" 20 ", "'code'", " 19"))


def test_a_fraction_that_rounds_to_zero_is_reported(audit: Audit) -> None:
    assert len(replay(10, 100, 0.02, "mix", audit)) == 10
    (remark,) = audit.remarks
    assert "replay" in remark and "0 rows" in remark
