"""Index tensors of tiny micro-batches, compared with values by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rpo_trainer.data.example_view import example_view
from rpo_trainer.step import batch as batch_module
from rpo_trainer.step.batch import AttentionPlan, Reach, Segment, sees
from rpo_trainer.step.packing import forward_tokens, pack

# Two responses of two and one tokens after a prompt of three; then one response with an untrained token.
FIRST: dict[str, Any] = {
    "id": "first",
    "prompt_ids": [10, 11, 12],
    "response_ids": [[20, 21], [30]],
    "response_mask": [[1, 1], [1]],
    "rewards": [1.5, -0.5],
    "reference_logps": [-3.0, -4.0],
}
SECOND: dict[str, Any] = {
    "prompt_ids": [13],
    "response_ids": [[40, 41, 42]],
    "response_mask": [[1, 0, 1]],
    "rewards": [0.0],
    "reference_logps": [-5.0],
}


def inputs_of(layout: str) -> dict[str, Any]:
    inputs = pack([FIRST, SECOND], layout, pad_token_id=9).model_inputs
    assert inputs.router is None and inputs.stats is None
    found = {k: v for k, v in vars(inputs).items() if k not in ("router", "stats")}
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def test_shared():
    assert inputs_of("shared") == {
        "input_ids": [[10, 11, 12, 20, 21, 30, 13, 40, 41, 42]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]],
        "attention_mask": None,
        "plan": AttentionPlan((Segment(0, 5), Segment(5, 6, 0, 3), Segment(6, 10))),
        "rows": None,
        # 30 is predicted by the prompt's last token, not by 21, which precedes it in the row.
        "predict_index": [2, 3, 2, 6, 8],
        "labels": [20, 21, 30, 40, 42],
        "last_index": [4, 5, 9],
        "token_uses": [[2, 2, 2, 1, 1, 1, 1, 1, 1, 1]],
    }


def test_packed():
    assert inputs_of("packed") == {
        "input_ids": [[10, 11, 12, 20, 21, 10, 11, 12, 30, 13, 40, 41, 42]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]],
        "attention_mask": None,
        "plan": AttentionPlan((Segment(0, 5), Segment(5, 9), Segment(9, 13))),
        "rows": None,
        "predict_index": [2, 3, 7, 9, 11],
        "labels": [20, 21, 30, 40, 42],
        "last_index": [4, 8, 12],
        "token_uses": [[1] * 13],
    }


def test_single_is_packed_rows_split_at_each_response():
    packed, single = inputs_of("packed"), inputs_of("single")
    assert single == {**packed, "plan": None, "rows": ((0, 5), (5, 9), (9, 13))}


def test_padded():
    assert inputs_of("padded") == {
        "input_ids": [[10, 11, 12, 20, 21], [10, 11, 12, 30, 9], [13, 40, 41, 42, 9]],
        "position_ids": [[0, 1, 2, 3, 4]] * 3,
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "plan": None,
        "rows": None,
        "predict_index": [2, 3, 7, 10, 12],
        "labels": [20, 21, 30, 40, 42],
        "last_index": [4, 8, 13],
        "token_uses": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
    }


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_what_is_next_to_the_inputs(layout):
    batch = pack([FIRST, SECOND], layout)
    assert batch.response_index.tolist() == [0, 0, 1, 2, 2]
    assert batch.response_tokens.tolist() == [2, 1, 2]
    assert batch.rewards.tolist() == [1.5, -0.5, 0.0]
    assert batch.reference_logps.tolist() == [-3.0, -4.0, -5.0]
    assert batch.ids == ["first", "?"]
    # By K: the second example has one response, the first two.
    assert [group.tolist() for group in batch.groups] == [[[2]], [[0, 1]]]
    assert batch.example_order == [1, 0]


def test_groups_of_mixed_k_keep_the_order_of_the_examples():
    def example(k: int) -> dict[str, Any]:
        return {"prompt_ids": [1], "response_ids": [[2]] * k, "response_mask": [[1]] * k}

    batch = pack([example(3), example(2), example(3)], "shared")
    assert [group.tolist() for group in batch.groups] == [[[3, 4]], [[0, 1, 2], [5, 6, 7]]]
    assert batch.example_order == [1, 0, 2]
    assert batch.rewards is None and batch.reference_logps is None


def test_a_column_that_one_example_lacks_is_left_out():
    assert pack([FIRST, {**SECOND, "rewards": None}], "shared").rewards is None


def test_plan_of_many_responses_tiles_the_row():
    example = {
        "prompt_ids": [1, 2, 3, 4],
        "response_ids": [[5, 6], [7], [8, 9, 10]],
        "response_mask": [[1, 1], [1], [1, 1, 1]],
    }
    plan = pack([SECOND, example], "shared").model_inputs.plan
    assert plan.segments == (
        Segment(0, 4), Segment(4, 10), Segment(10, 11, 4, 8), Segment(11, 14, 4, 8),
    )  # fmt: skip


def test_forward_tokens():
    assert forward_tokens(FIRST, "shared") == 6
    assert forward_tokens(FIRST, "packed") == forward_tokens(FIRST, "padded") == 9
    assert forward_tokens(SECOND, "shared") == 4


def seen(plan: AttentionPlan, unit: int, window: int | None = None) -> list[list[int]]:
    return plan.mask(unit, Reach(window), torch.device("cpu")).int().tolist()


TWO = (Segment(0, 5), Segment(5, 7, 0, 3))  # prompt of 3, responses of 2 and 2


def test_short_examples_are_one_unit_and_long_ones_go_by_segment(monkeypatch):
    # Examples of 7, 3 and 4 tokens.
    plan = (*TWO, Segment(7, 10), Segment(10, 13), Segment(13, 14, 10, 12))
    for most, units in (
        (14, [plan]),
        (10, [plan[:3], plan[3:]]),
        (9, [plan[:2], plan[2:]]),
        (6, [plan[:1], plan[1:2], plan[2:3], plan[3:]]),
        (3, [plan[:1], plan[1:2], plan[2:3], plan[3:4], plan[4:]]),
    ):
        monkeypatch.setattr(batch_module, "_DENSE_TOKENS", most)
        assert list(AttentionPlan(plan).units) == units, most


def test_mask_of_one_segment_is_causal_after_its_prefix(monkeypatch):
    monkeypatch.setattr(batch_module, "_DENSE_TOKENS", 0)
    plan = AttentionPlan(TWO)
    assert seen(plan, 0) == [[int(j <= i) for j in range(5)] for i in range(5)]
    assert seen(plan, 1) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_mask_of_a_window_goes_by_position(monkeypatch):
    monkeypatch.setattr(batch_module, "_DENSE_TOKENS", 0)
    plan = AttentionPlan((*TWO, Segment(7, 10)))
    assert seen(plan, 1, 3) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen(plan, 1, 1) == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert seen(plan, 2, 2) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_mask_of_several_segments():
    plan = AttentionPlan((*TWO, Segment(7, 9)))
    assert seen(plan, 0) == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    # With a window of two, the first token of the second response directly follows the prompt.
    assert seen(plan, 0, 2)[3:7] == [
        [0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
    ]


def test_masks_are_made_once():
    plan, device = AttentionPlan(TWO), torch.device("cpu")
    assert plan.mask(0, Reach(), device) is plan.mask(0, Reach(), device)
    assert plan.mask(0, Reach(window=2), device) is not plan.mask(0, Reach(), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "row first .*empty"),
        ({"response_mask": [[1, 1], [1, 1]]}, "row first .*response_mask"),
        ({"response_mask": [[1, 1]]}, "row first .*response_mask"),
        ({"rewards": [1.0]}, "row first .*1 rewards .*2"),
        ({"reference_logps": [1.0] * 3}, "row first .*3 reference_logps .*2"),
    ],
)
def test_an_example_that_does_not_fit_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pack([SECOND, {**FIRST, **change}], "shared")


def plain_inputs(examples: list[dict[str, Any]], layout: str) -> dict[str, list[Any]]:
    """The inputs of a micro-batch, token by token."""
    rows: list[list[tuple[int, int, int]]] = [[]]  # token, position, uses
    found: dict[str, list[Any]] = {"predict_index": [], "labels": [], "last_index": [], "owner": []}
    longest = max(len(e["prompt_ids"]) + len(r) for e in examples for r in e["response_ids"])
    for example in examples:
        prompt, responses = example["prompt_ids"], example["response_ids"]
        for k, (response, mask) in enumerate(zip(responses, example["response_mask"], strict=True)):
            if layout == "padded" and rows[-1]:
                rows.append([])
            before = longest * (len(rows) - 1)
            if k == 0 or layout != "shared":
                uses = len(responses) if layout == "shared" else 1
                rows[-1] += [(token, place, uses) for place, token in enumerate(prompt)]
                end = before + len(rows[-1]) - 1
            first = before + len(rows[-1])
            rows[-1] += [(token, place, 1) for place, token in enumerate(response, len(prompt))]
            for place, trained in enumerate(mask):
                if trained:
                    found["predict_index"].append(first + place - 1 if place else end)
                    found["labels"].append(response[place])
                    found["owner"].append(len(found["last_index"]))
            found["last_index"].append(first + len(response) - 1 if response else end)
    if layout == "padded":
        rows = [[*row, *((9, p, 0) for p in range(len(row), longest))] for row in rows]
    for i, name in enumerate(("input_ids", "position_ids", "token_uses")):
        found[name] = [[value[i] for value in row] for row in rows]
    return found


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("seed", range(5))
def test_arrays_and_lists_are_packed_as_token_by_token(layout, seed):
    rng = np.random.default_rng(seed)

    def example() -> dict[str, Any]:
        lengths = rng.integers(0, 6, rng.integers(1, 5))
        return {
            "prompt_ids": rng.integers(0, 99, rng.integers(1, 6)).tolist(),
            "response_ids": [rng.integers(0, 99, n).tolist() for n in lengths],
            "response_mask": [rng.integers(0, 2, n).tolist() for n in lengths],
        }

    examples = [example() for _ in range(rng.integers(1, 5))]
    expected = plain_inputs(examples, layout)
    for rows in (examples, list(example_view(examples))):
        batch = pack(rows, layout, pad_token_id=9)
        found = {
            name: value.tolist()
            for name, value in vars(batch.model_inputs).items()
            if name in expected
        }
        assert {**found, "owner": batch.response_index.tolist()} == expected
        assert batch.response_tokens.tolist() == [
            sum(mask) for example in examples for mask in example["response_mask"]
        ]
        assert batch.counts.tolist() == [
            len(examples),
            sum(sum(example["response_mask"][0]) for example in examples),
        ]
        assert {t.dtype for t in vars(batch.model_inputs).values() if torch.is_tensor(t)} == {
            torch.long
        }


def test_an_empty_micro_batch_is_refused():
    with pytest.raises(ValueError, match="example"):
        pack([], "shared")


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_segments_are_split_at_chunk_ends(chunk):
    """Segments split at chunk ends have the visibility of chunks by position."""
    plan = AttentionPlan(
        (Segment(0, 7), Segment(7, 12, 0, 5), Segment(12, 16, 0, 5), Segment(16, 18))
    )
    seen = torch.zeros(18, 18, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in batch_module._cut(plan.segments, chunk):
        seen[start:stop, prefix_start:prefix_stop] = True
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    wanted = plan.mask(0, Reach(chunk=chunk), torch.device("cpu"))
    assert torch.equal(seen, wanted)


def test_a_chunk_sees_no_position_before_its_first():
    positions = torch.arange(10)
    seen = sees(positions[:, None], positions[None], Reach(chunk=4))
    assert [row.nonzero().flatten().tolist() for row in seen[[3, 4, 7, 9]]] == [
        [0, 1, 2, 3], [4], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip
