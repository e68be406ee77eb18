"""`score` and `pairs` on rows that come with their responses: every field of the recipe is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpo_trainer.data import Audit
from rpo_trainer.errors import DataError
from rpo_trainer.recipe import load_recipe
from rpo_trainer.stages.prepare import StagePreparer
from tests.raising import raises

ROWS = [
    {
        "prompt": "1 + 1 = ",
        "ground_truth": "2",
        "responses": ["3", "2", "22"],
        "rewards": [9, 1, 5],
    },
    {
        "prompt": "2 + 1 = ",
        "ground_truth": "3",
        "responses": ["3", "33", "4"],
        "rewards": [1, 2, 3],
    },
]
RECIPE = """
model: {{name_or_path: ./m}}
stages:
  - name: s
    kind: {kind}
    beta: 0.1
    learning_rate: 1.0e-5
    global_batch_size: 2
    data:
      train: [{{path: rows.jsonl}}]
{extra}
"""


def rows_of(tmp_path: Path, kind: str, *extra: str, rows: list[dict[str, Any]] | None = None):
    text = "".join(json.dumps(row) + "\n" for row in rows or ROWS)
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "r.yaml").write_text(
        RECIPE.format(kind=kind, extra="".join(f"      {line}\n" for line in extra))
    )
    preparer = StagePreparer(load_recipe(tmp_path / "r.yaml"))
    made, _ = preparer.rows(preparer.stages[0], Audit())
    return [(row["responses"], row["rewards"]) for row in made]


def test_pairs_makes_pairs_of_k_responses_by_their_rewards(tmp_path):
    assert rows_of(tmp_path, "dpo", "pairs: {select: best_worst}") == [
        (["3", "2"], [9.0, 1.0]),
        (["4", "3"], [3.0, 1.0]),
    ]


def test_score_replaces_the_rewards(tmp_path):
    made = rows_of(tmp_path, "rpo", "score: {verifier: exact}", "pairs: {select: all_responses}")
    assert made == [(["2", "3", "22"], [1.0, 0.0, 0.0]), (["3", "4", "33"], [1.0, 0.0, 0.0])]


def test_score_gives_rewards_where_there_are_none(tmp_path):
    bare = [{k: v for k, v in row.items() if k != "rewards"} for row in ROWS]
    made = rows_of(tmp_path, "dpo", "score: {verifier: partial_match}", rows=bare)
    assert [responses for responses, _ in made] == [["2", "3"], ["3", "4"]]


def test_min_gap_is_read(tmp_path):
    assert len(rows_of(tmp_path, "dpo", "pairs: {min_gap: 2.0}")) == 1


def test_ranked_rows_become_pairs_without_rewards(tmp_path):
    bare = [{k: v for k, v in row.items() if k != "rewards"} for row in ROWS]
    assert rows_of(tmp_path, "dpo", "pairs: {select: best_worst}", rows=bare) == [
        (["3", "22"], None),
        (["3", "4"], None),
    ]
    with raises("data.missing-rewards", DataError):
        rows_of(tmp_path, "rpo", "pairs: {select: best_worst}", rows=bare)


def test_sampled_rows_are_not_taken_for_ranked_ones(tmp_path):
    bare = [{k: v for k, v in row.items() if k != "rewards"} for row in ROWS]
    sampled = [{**row, "sampling": {"temperature": 1.0}} for row in bare]
    with raises("data.unscored-responses", DataError):
        rows_of(tmp_path, "dpo", "pairs: {select: best_worst}", rows=sampled)
    assert rows_of(tmp_path, "dpo", "score: {verifier: partial_match}", rows=sampled)
    ranked = [{**row, "ranks": [2, 0, 1]} for row in sampled]
    assert rows_of(tmp_path, "dpo", "pairs: {select: best_worst}", rows=ranked)[0][0] == ["2", "3"]
    scored = [{**row, "sampling": {"temperature": 1.0}} for row in ROWS]
    assert rows_of(tmp_path, "dpo", "pairs: {select: best_worst}", rows=scored)


def test_some_rows_without_rewards_say_what_to_do(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "rewards": [1, None, 3]}]
    with raises("rewards.incomplete", DataError) as error:
        rows_of(tmp_path, "dpo", "pairs: {select: best_worst}", rows=rows)
    assert "1 of 2" in error.value.what
