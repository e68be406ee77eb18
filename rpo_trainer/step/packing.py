"""Tokenized examples → one packed row per micro-batch, with the index tensors for the step.

Types and shapes are defined in `rpo_trainer.step.batch`.

A tokenized example is a mapping with `prompt_ids` `[p]`, `response_ids` (K arrays or lists), `response_mask`
(K arrays or lists, 1 = trained), and for preferences `rewards` and `reference_logps` (K numbers each). There
are four layouts:

    shared   [1, T]  prompt, response 1, ..., response K, next example      (the prompt once per example)
    packed   [1, T]  prompt, response 1, prompt, response 2, ...            (prompts repeated)
    padded   [R, L]  one row per response, padded on the right              (any model that ignores padding)
    single   [1, T]  as packed, but with a separate forward for each response
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpo_trainer.data.arrow_rows import Array
from rpo_trainer.data.example_view import ExampleView
from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.attention_varlen import VarlenIndex
from rpo_trainer.step.batch import AttentionPlan, Layout, ModelInputs, PackedBatch, Segment


def forward_tokens(example: Mapping[str, Any], layout: Layout) -> int:
    """Return the number of tokens that the model processes for an example: its cost except for attention."""
    responses = example["response_ids"]
    prompts = 1 if layout == "shared" else len(responses)
    return prompts * len(example["prompt_ids"]) + sum(map(len, responses))


def forward_costs(view: ExampleView, layout: Layout) -> Array:
    """Return `[n]` int64, the `forward_tokens` of each example."""
    counts, lengths = view.response_counts(), view.response_lengths()
    owner = np.repeat(np.arange(len(counts)), counts)
    own = np.zeros(len(counts), dtype=np.int64)
    np.add.at(own, owner, lengths)
    return view.prompt_lengths() * (1 if layout == "shared" else counts) + own


def pack(
    examples: Sequence[Mapping[str, Any]],
    layout: Layout,
    *,
    pad_token_id: int = 0,
    filler: bool = False,
) -> PackedBatch:
    """Pack tokenized examples into the tensors of one micro-batch.

    Args:
        filler: the examples have weight 0, and only keep the number of forwards equal on all ranks.
    """
    if not examples:
        raise ValueError("a micro-batch needs at least one example")
    for example in examples:
        _check(example)
    rows = _padded(examples, pad_token_id) if layout == "padded" else _packed(examples, layout)
    groups, order = _groups(examples)
    tokens = np.bincount(rows.response_index, minlength=len(rows.last_index))
    chosen = sum(int(np.count_nonzero(example["response_mask"][0])) for example in examples)
    single = layout == "single"
    spans = tuple((s.start, s.stop) for s in rows.plan.segments) if rows.plan and single else None
    return PackedBatch(
        model_inputs=ModelInputs(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            plan=None if single else rows.plan,
            rows=spans,
            predict_index=torch.from_numpy(rows.predict_index),
            labels=torch.from_numpy(rows.labels),
            last_index=torch.from_numpy(rows.last_index),
            token_uses=rows.token_uses,
        ),
        response_index=torch.from_numpy(rows.response_index),
        response_tokens=torch.from_numpy(tokens),
        groups=groups,
        example_order=order,
        rewards=_per_response(examples, "rewards"),
        reference_logps=_per_response(examples, "reference_logps"),
        ids=["?" if (i := example.get("id")) is None else str(i) for example in examples],
        weights=torch.full((len(examples),), float(not filler)),
        counts=torch.tensor([0, 0] if filler else [len(examples), chosen], dtype=torch.float64),
    )


@dataclass
class _Rows:
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    plan: AttentionPlan | None
    predict_index: Array
    labels: Array
    response_index: Array
    last_index: Array
    token_uses: Tensor


@dataclass
class _Texts:
    """The responses of a micro-batch: flat tokens, and `[R]` values of each response.

    Attributes:
        ids: tokens of all responses.
        lengths: tokens of each response.
        prompts: tokens of its prompt.
        index: `[N]`, place of each trained token in its response.
        owner: `[N]`, response of each trained token.
        labels: `[N]`, the trained tokens.
    """

    ids: list[Any]
    lengths: Array
    prompts: Array
    index: Array
    owner: Array
    labels: Array

    @classmethod
    def of(cls, examples: Sequence[Mapping[str, Any]]) -> _Texts:
        ids = [response for example in examples for response in example["response_ids"]]
        masks = [mask for example in examples for mask in example["response_mask"]]
        lengths = np.array([len(each) for each in ids], dtype=np.int64)
        trained = np.flatnonzero(_joined(masks))
        owner = np.repeat(np.arange(len(ids)), lengths)[trained]
        prompts = [len(e["prompt_ids"]) for e in examples for _ in e["response_ids"]]
        return cls(
            ids,
            lengths,
            np.array(prompts, dtype=np.int64),
            trained - _starts(lengths)[owner],
            owner,
            _joined(ids)[trained],
        )


def _packed(examples: Sequence[Mapping[str, Any]], layout: Layout) -> _Rows:
    texts = _Texts.of(examples)
    parts: list[Any] = []  # prompts and responses in the order of the row
    positions: list[int] = []  # of the first token of each part
    uses: list[int] = []
    segments: list[Segment] = []
    firsts: list[int] = []  # place of the first token of each response
    prompt_stops: list[int] = []
    place = 0
    for example in examples:
        prompt, responses = example["prompt_ids"], example["response_ids"]
        length = len(prompt)
        for k, response in enumerate(responses):
            start, prefix = place, (0, 0)
            if k == 0 or layout != "shared":
                parts.append(prompt)
                positions.append(0)
                uses.append(len(responses) if layout == "shared" else 1)
                place += length
                prompt_stops.append(place)
            else:
                prompt_stops.append(prompt_stops[-1])
                prefix = (prompt_stops[-1] - length, prompt_stops[-1])
            firsts.append(place)
            parts.append(response)
            positions.append(length)
            uses.append(1)
            place += len(response)
            if place > start:
                segments.append(Segment(start, place, *prefix))
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    first, before = np.array(firsts, dtype=np.int64), np.array(prompt_stops, dtype=np.int64) - 1
    shift = np.repeat(_starts(lengths) - np.array(positions, dtype=np.int64), lengths)
    # The first token of a response is predicted by the last token of its prompt, wherever that is.
    preceding = first[texts.owner] + texts.index - 1
    predict = np.where(texts.index > 0, preceding, before[texts.owner])
    return _Rows(
        input_ids=torch.from_numpy(_joined(parts)[None]),
        position_ids=torch.from_numpy((np.arange(place) - shift)[None]),
        attention_mask=None,
        plan=AttentionPlan(tuple(segments), VarlenIndex.of(segments), FlexIndex.of(segments)),
        predict_index=predict,
        labels=texts.labels,
        response_index=texts.owner,
        last_index=np.where(texts.lengths > 0, first + texts.lengths - 1, before),
        token_uses=torch.from_numpy(np.repeat(np.array(uses, dtype=np.int64), lengths)[None]),
    )


def _padded(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> _Rows:
    texts = _Texts.of(examples)
    totals = texts.prompts + texts.lengths
    longest = int(totals.max())
    real = np.arange(longest) < totals[:, None]
    input_ids = np.full((len(totals), longest), pad_token_id, dtype=np.int64)
    prompts = [example["prompt_ids"] for example in examples for _ in example["response_ids"]]
    input_ids[real] = _joined(
        [part for row in zip(prompts, texts.ids, strict=True) for part in row]
    )
    attention_mask = torch.from_numpy(real.astype(np.int64))
    starts = np.arange(len(totals)) * longest
    return _Rows(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(longest).expand(len(totals), longest).contiguous(),
        attention_mask=attention_mask,
        plan=None,
        predict_index=(starts + texts.prompts - 1)[texts.owner] + texts.index,
        labels=texts.labels,
        response_index=texts.owner,
        last_index=starts + totals - 1,
        token_uses=attention_mask,
    )


def _joined(lists: Sequence[Any]) -> Array:
    # A copy, also of one list: tensors must not share memory with the data.
    return np.concatenate([np.zeros(0, dtype=np.int64), *lists], dtype=np.int64, casting="unsafe")


def _starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def _groups(examples: Sequence[Mapping[str, Any]]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Group examples by number of responses, so that each loss call receives a dense `[b, k]`."""
    by_k: dict[int, list[tuple[int, list[int]]]] = {}
    number = 0
    for i, example in enumerate(examples):
        k = len(example["response_ids"])
        by_k.setdefault(k, []).append((i, list(range(number, number + k))))
        number += k
    ordered = [by_k[k] for k in sorted(by_k)]
    groups = tuple(torch.tensor([responses for _, responses in group]) for group in ordered)
    return groups, [i for group in ordered for i, _ in group]


def _check(example: Mapping[str, Any]) -> None:
    """Raise ValueError for inconsistent examples, which would be packed incorrectly."""
    responses = example["response_ids"]
    fault = None
    if not len(example["prompt_ids"]):
        fault = "an empty prompt, so that the first token cannot be predicted"
    elif [*map(len, responses)] != [*map(len, example["response_mask"])]:
        fault = "response_ids and response_mask of different lengths"
    for column in ("rewards", "reference_logps"):
        values = example.get(column)
        if values is not None and len(values) != len(responses):
            fault = f"{len(values)} {column} for {len(responses)} responses"
    if fault:
        raise ValueError(f"row {example.get('id', '?')} has {fault}")


def _per_response(examples: Sequence[Mapping[str, Any]], column: str) -> Tensor | None:
    if any(example.get(column) is None for example in examples):
        return None
    values = [value for example in examples for value in example[column]]
    return torch.tensor(values, dtype=torch.float32)
