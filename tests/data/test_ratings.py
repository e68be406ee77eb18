"""Rating rows: formats, targets, and rows held out by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.data import hold_out, load_rows, prepare_dataset, rating_targets
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.audit import Audit
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.sources import RawSource
from rpo_trainer.errors import DataError, Problems
from tests.raising import problems_of, raises

FIVE = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}


def rated(*rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    raw = RawSource("src", list(rows), list(range(1, len(rows) + 1)), "file.jsonl")
    return adapt(raw, kind="rating", audit=Audit(), **options)


# ---------------------------------------------------------------- formats


def test_attributes_by_name() -> None:
    (row,) = rated({"prompt": "p", "response": "r", "attributes": {"depth": 3, "wit": None}})
    assert row == {
        "id": "src:1", "source": "src", "prompt": "p", "responses": ["r"],
        "attributes": {"depth": 3.0, "wit": None},
    }  # fmt: skip


def test_one_score() -> None:
    (row,) = rated({"prompt": [{"role": "user", "content": "q"}], "response": "r", "score": 2.5})
    assert row["attributes"] == {"score": 2.5} and row["prompt"][0]["content"] == "q"


def test_helpsteer2_is_a_chat_and_may_lack_ratings() -> None:
    prompt = "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nq2 <extra_id_1> x"
    first, second = rated(
        {"prompt": "q", "response": "r", **FIVE},
        {"prompt": prompt, "response": "r", **FIVE, "complexity": None},
    )
    assert first["prompt"] == [{"role": "user", "content": "q"}]
    assert [(m["role"], m["content"]) for m in second["prompt"]] == [
        ("user", "q"), ("assistant", "a"), ("user", "q2 <extra_id_1> x"),
    ]  # fmt: skip
    assert first["attributes"] == {name: float(value) for name, value in FIVE.items()}
    assert second["attributes"]["complexity"] is None


@pytest.mark.parametrize(
    ("row", "code", "named"),
    [
        ({"attributes": {}}, "data.wrong-type", "`attributes`"),
        ({"attributes": [1, 2]}, "data.wrong-type", "`attributes`"),
        ({"attributes": {"wit": "high"}}, "data.bad-rating", "`wit` is text"),
        ({"attributes": {"wit": True}}, "data.bad-rating", "`wit` is a bool"),
        ({"attributes": {"wit": float("nan")}}, "data.bad-rating", "`wit` is NaN"),
        ({**FIVE, "verbosity": 5}, "data.rating-out-of-range", "`verbosity`"),
        ({"score": None}, "data.missing-value", "`score`"),
    ],
)
def test_a_bad_rating_is_named_with_its_row(row: dict[str, Any], code: str, named: str) -> None:
    with raises(code, DataError, rows=["src:1"], of=1) as found:
        rated({"prompt": "p", "response": "r", **row})
    assert named in found.value.what


def test_rows_of_another_kind_say_what_is_known() -> None:
    with raises("data.unrecognized-columns", DataError) as found:
        rated({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert "ratings" in found.value.what and "'pairs'" in str(found.value.why)
    assert "helpsteer2" in str(found.value.fix)


def test_a_margin_is_the_gap_of_pairs_only_by_name() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 3}
    raw = RawSource("src", [row], [1], "file.jsonl")
    audit = Audit()
    (plain,) = adapt(raw, kind="pair", audit=audit)
    assert plain["rewards"] is None and audit.extra_columns == {"src": ["margin"]}
    (named,) = adapt(raw, kind="pair", format="margin", audit=Audit(), require_rewards=True)
    assert named["rewards"] == [1.5, -1.5]
    raw.rows[0] = {**row, "margin": "wide"}
    with raises("data.bad-reward", DataError):
        adapt(raw, kind="pair", format="margin", audit=Audit(), require_rewards=True)


# ---------------------------------------------------------------- targets


def row_of(n: int, **attributes: Any) -> dict[str, Any]:
    return {
        "id": f"r{n}",
        "source": "s",
        "prompt": f"p{n}",
        "responses": ["r"],
        "attributes": attributes,
    }


def test_targets_are_in_the_order_of_the_attributes_and_the_rest_is_counted() -> None:
    audit = Audit()
    rows = [row_of(1, b=2.0, a=1.0, c=9.0), row_of(2, a=3.0), row_of(3, c=1.0), row_of(4, a=None)]
    found = rating_targets(rows, ["a", "b"], audit=audit)
    assert [(row["id"], row["attributes"]) for row in found] == [
        ("r1", [1.0, 2.0]),
        ("r2", [3.0, None]),
    ]
    assert audit.as_dict()["dropped"] == {"no_ratings": {"count": 2, "examples": ["r3", "r4"]}}
    assert audit.remarks == ["ratings not used: c"]
    assert audit.ratings["a"]["rated"] == 2 and audit.ratings["b"]["rated"] == 1
    assert "a: 2 ratings, from 1 to 3, mean 2.00" in audit.summary_lines()


def test_ratings_out_of_range_are_errors_of_all_rows_at_once() -> None:
    rows = [row_of(1, a=5.0, b=0.0), row_of(2, a=4.0, b=-1.0), row_of(3, a=6.0, b=1.0)]
    with pytest.raises(Problems) as found:
        rating_targets(rows, ["a", "b"], rating_range=(0, 4), audit=Audit())
    one, other = problems_of(found.value)
    for error, name, ids in ((one, "`a`", ["r1", "r3"]), (other, "`b`", ["r2"])):
        assert error.code == "data.rating-out-of-range"
        assert name in error.what and error.details == {"rows": ids, "of": 3}
    assert len(rating_targets(rows, ["a", "b"], rating_range=(-1, 6), audit=Audit())) == 3


def test_an_attribute_that_no_row_rates_is_an_error() -> None:
    with raises("data.unrated-attribute", DataError) as found:
        rating_targets([row_of(1, a=1.0, wit=None)], ["a", "wit"], audit=Audit())
    assert found.value.what.endswith(" wit") and str(found.value.why).endswith(" a")


def test_prepared_rows_have_their_ratings_and_blank_responses_are_dropped() -> None:
    audit = Audit()
    rows = [
        {"prompt": "p", "response": response, "attributes": {"wit": wit, "depth": None}}
        for response, wit in (("good", 4), (" ", 3), ("bad", 1))
    ]
    rows[2]["attributes"]["depth"] = 2
    data = prepare_dataset(
        rows, character_tokenizer(), kind="rating", max_length=64, attributes=["wit", "depth"],
        audit=audit,
    )  # fmt: skip
    assert data["attributes"][:] == [[4.0, None], [1.0, 2.0]]
    assert [len(responses) for responses in data["response_ids"]] == [1, 1]
    assert list(audit.dropped) == ["empty_response"]
    assert "duplicate_prompt" not in audit.warnings  # several responses to a prompt are expected


# ---------------------------------------------------------------- held-out prompts


def test_held_out_prompts_are_in_one_part_only_with_all_their_rows() -> None:
    rows = [row_of(n // 2, a=float(n)) for n in range(40)]
    train, held = hold_out(rows, 0.25, seed=0)
    assert len(held) == 10 and len(train) == 30
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert hold_out(rows, 0.25, seed=0) == (train, held)
    assert hold_out(rows, 0.25, seed=1) != (train, held)
    assert [row for row in rows if row in held] == held


def test_some_prompt_is_held_out_and_some_is_left() -> None:
    rows = [row_of(n, a=1.0) for n in range(3)]
    assert [len(part) for part in hold_out(rows, 0.01, seed=0)] == [2, 1]
    assert [len(part) for part in hold_out(rows, 0.99, seed=0)] == [1, 2]
    with raises("data.too-few-prompts", DataError, where="data.eval_fraction") as error:
        hold_out([row_of(1), row_of(1)], 0.5, seed=0)
    assert "2 rows with 1 " in error.value.what


# ---------------------------------------------------------------- real rows


def source(path: Path, **fields: Any) -> Any:
    fields = {"path": str(path), "format": None, "columns": None, **fields}
    empty = dict.fromkeys(
        (
            "task",
            "split",
            "weight",
            "max_rows",
            "size",
            "seed",
            "special_tokens",
            "chat_template_kwargs",
            "model_kwargs",
        )
    )
    return SimpleNamespace(**{**empty, **fields})


def test_real_ratings_of_stories(shared_dir: Path) -> None:
    path = shared_dir / "data" / "dev" / "attr_hanna_human_stories.jsonl"
    spec = source(path, columns={"attributes": "ratings"})
    rows = load_rows([spec], kind="rating", base_dir=None, audit=Audit(), seed=0)
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["attributes"] for row in rows] == [row["ratings"] for row in raw]
    names = ["coherence", "empathy", "surprise", "engagement", "complexity", "relevance"]
    found = rating_targets(rows, names, rating_range=(1, 5), audit=Audit())
    assert len(found) == len(raw) == 54


def test_real_scores(shared_dir: Path) -> None:
    path = shared_dir / "data" / "dev" / "scored_single_prometheus_mtbench.jsonl"
    rows = load_rows([source(path)], kind="rating", base_dir=None, audit=Audit(), seed=0)
    raw = [json.loads(line)["score"] for line in path.read_text().splitlines()]
    assert [row["attributes"] for row in rows] == [{"score": score} for score in raw]
