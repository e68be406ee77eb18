"""Examples as a data set, and micro-batches with their weights and counts."""

from __future__ import annotations

import datasets
import pytest
import torch

from rpo_trainer.step.packing import forward_tokens
from rpo_trainer.trainers.examples import Examples, PackingCollator, StepCollator
from tests.trainers.plain import as_lists, make_rows

ROWS = make_rows(0, (2, 1, 4, 3), spans=True)


@pytest.mark.parametrize("kind", ["list", "dataset", "shuffled", "selected"])
def test_rows_costs_and_counts(kind):
    stored, rows = ROWS, ROWS
    if kind != "list":
        stored = datasets.Dataset.from_list(ROWS)
    if kind == "shuffled":
        stored = stored.select([2, 0, 3, 1])
        rows = [ROWS[i] for i in (2, 0, 3, 1)]
    if kind == "selected":
        stored, rows = stored.select([3, 1]), [ROWS[3], ROWS[1]]
    examples = Examples(stored)
    assert len(examples) == len(rows)
    assert examples.response_counts().tolist() == [len(row["response_ids"]) for row in rows]
    for layout in ("shared", "packed", "padded"):
        assert examples.costs(layout).tolist() == [forward_tokens(row, layout) for row in rows]
    for i, row in enumerate(rows):
        assert as_lists(examples[i]) == row


def test_costs_count_the_prompt_once_where_it_is_shared():
    row = {"prompt_ids": [1, 2, 3], "response_ids": [[4], [5, 6]], "response_mask": [[1], [1, 1]]}
    assert Examples([row]).costs("shared").tolist() == [6]
    assert Examples([row]).costs("packed").tolist() == [9]


def test_extra_columns_lie_next_to_the_rows():
    examples = Examples(datasets.Dataset.from_list(ROWS))
    examples.extra["reference_logps"] = [[float(i)] for i in range(4)]
    assert examples[2]["reference_logps"] == [2.0]
    assert examples[2]["id"] == "row-2"


@pytest.mark.parametrize("stored", [list, datasets.Dataset.from_list])
def test_what_lacks_a_column_is_found(stored):
    rows = [{**row, "rewards": None if i % 2 else [1.0]} for i, row in enumerate(ROWS)]
    assert Examples(stored(rows)).without("rewards").tolist() == [1, 3]
    assert Examples(stored(ROWS)).without("rewards").tolist() == [0, 1, 2, 3]
    examples = Examples(stored(ROWS))
    examples.extra["rewards"] = [[1.0], None, [1.0], [1.0]]
    assert examples.without("rewards").tolist() == [1]
    if stored is not list:
        assert Examples(stored(rows).select([2, 3, 1])).without("rewards").tolist() == [1, 2]


def test_the_micro_batches_of_a_step_come_together():
    examples = Examples(ROWS)
    step = StepCollator(PackingCollator("shared", 0, examples))(
        examples.__getitems__([[2, 0], [], [1]])
    )
    assert [batch.ids for batch in step.micro_batches] == [
        ["row-2", "row-0"], ["row-0"], ["row-1"],
    ]  # fmt: skip
    assert [batch.weights.sum() for batch in step.micro_batches] == [2, 0, 1]
    assert step.counts.tolist() == sum(b.counts for b in step.micro_batches).tolist()


def test_collator_counts_examples_and_tokens_of_the_first_responses():
    batch = PackingCollator("shared", 0)(ROWS)
    assert batch.weights.tolist() == [1.0] * 4
    tokens = sum(sum(row["response_mask"][0]) for row in ROWS)
    assert batch.counts.tolist() == [4, tokens] and batch.counts.dtype == torch.float64
    assert batch.ids == ["row-0", "row-1", "row-2", "row-3"]


def test_a_rank_without_examples_gets_a_filler_that_counts_nothing():
    batch = PackingCollator("shared", 0, Examples(ROWS))([])
    assert batch.weights.tolist() == [0.0]
    assert batch.counts.tolist() == [0, 0]
    assert batch.model_inputs.input_ids.numel() > 0
    with pytest.raises(ValueError, match="filler"):
        PackingCollator("shared", 0)([])
