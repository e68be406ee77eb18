"""Tokenized examples → one packed row per micro-batch, with the index tensors for the step.

Types and shapes are defined in `rpo_trainer.step.batch`.

A tokenized example is a mapping with `prompt_ids` `[p]`, `response_ids` (K lists), `response_mask` (K lists,
1 = trained), and for preferences `rewards` and `reference_logps` (K numbers each). There are four layouts:

    shared   [1, T]  prompt, response 1, ..., response K, next example      (the prompt once per example)
    packed   [1, T]  prompt, response 1, prompt, response 2, ...            (prompts repeated)
    padded   [R, L]  one row per response, padded on the right              (any model that ignores padding)
    single   [1, T]  as packed, but with a separate forward for each response
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.attention_varlen import VarlenIndex
from rpo_trainer.step.batch import AttentionPlan, Layout, ModelInputs, PackedBatch, Segment


def forward_tokens(example: Mapping[str, Any], layout: Layout) -> int:
    """Return the number of tokens that the model processes for an example: its cost except for attention."""
    responses = example["response_ids"]
    prompts = 1 if layout == "shared" else len(responses)
    return prompts * len(example["prompt_ids"]) + sum(map(len, responses))


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
    tokens = torch.zeros(rows.responses, dtype=torch.long)
    response_index = torch.tensor(rows.response_index, dtype=torch.long)
    tokens.index_add_(0, response_index, torch.ones_like(response_index))
    chosen = sum(sum(example["response_mask"][0]) for example in examples)
    single = layout == "single"
    spans = tuple((s.start, s.stop) for s in rows.plan.segments) if rows.plan and single else None
    return PackedBatch(
        model_inputs=ModelInputs(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            plan=None if single else rows.plan,
            rows=spans,
            predict_index=torch.tensor(rows.predict_index, dtype=torch.long),
            labels=torch.tensor(rows.labels, dtype=torch.long),
            last_index=torch.tensor(rows.last_index, dtype=torch.long),
            token_uses=rows.token_uses,
        ),
        response_index=response_index,
        response_tokens=tokens,
        groups=groups,
        example_order=order,
        rewards=_per_response(examples, "rewards"),
        reference_logps=_per_response(examples, "reference_logps"),
        ids=[str(example.get("id", "?")) for example in examples],
        weights=torch.full((len(examples),), float(not filler)),
        counts=torch.tensor([0, 0] if filler else [len(examples), chosen], dtype=torch.float64),
    )


@dataclass
class _Rows:
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    plan: AttentionPlan | None
    predict_index: list[int]
    labels: list[int]
    response_index: list[int]
    last_index: list[int]
    token_uses: Tensor
    responses: int


def _packed(examples: Sequence[Mapping[str, Any]], layout: Layout) -> _Rows:
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predict: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    uses: list[int] = []
    number = 0
    for example in examples:
        prompt = example["prompt_ids"]
        sharing = len(example["response_ids"]) if layout == "shared" else 1
        prompt_start = prompt_stop = 0
        for k, response in enumerate(example["response_ids"]):
            start = len(tokens)
            if k == 0 or layout != "shared":
                prompt_start, prompt_stop = start, start + len(prompt)
                tokens += prompt
                positions += range(len(prompt))
                uses += [sharing] * len(prompt)
                prefix = (0, 0)
            else:
                prefix = (prompt_start, prompt_stop)
            first = len(tokens)
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            uses += [1] * len(response)
            if len(tokens) > start:
                segments.append(Segment(start, len(tokens), *prefix))
            # The first token of a response is predicted by the last token of its prompt, wherever that is.
            for j, trained in enumerate(example["response_mask"][k]):
                if trained:
                    predict.append(first + j - 1 if j else prompt_stop - 1)
                    labels.append(response[j])
                    owner.append(number)
            last.append(len(tokens) - 1 if response else prompt_stop - 1)
            number += 1
    return _Rows(
        input_ids=torch.tensor([tokens], dtype=torch.long),
        position_ids=torch.tensor([positions], dtype=torch.long),
        attention_mask=None,
        plan=AttentionPlan(tuple(segments), VarlenIndex.of(segments), FlexIndex.of(segments)),
        predict_index=predict,
        labels=labels,
        response_index=owner,
        last_index=last,
        token_uses=torch.tensor([uses], dtype=torch.long),
        responses=number,
    )


def _padded(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> _Rows:
    rows = [
        (example["prompt_ids"], response, mask)
        for example in examples
        for response, mask in zip(example["response_ids"], example["response_mask"], strict=True)
    ]
    longest = max(len(prompt) + len(response) for prompt, response, _ in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    predict: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for number, (prompt, response, mask) in enumerate(rows):
        ids = [*prompt, *response]
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[number, : len(ids)] = 1
        last.append(number * longest + len(ids) - 1)
        for j, trained in enumerate(mask):
            if trained:
                predict.append(number * longest + len(prompt) + j - 1)
                labels.append(response[j])
                owner.append(number)
    position_ids = torch.arange(longest).expand(len(rows), longest).contiguous()
    return _Rows(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        plan=None,
        predict_index=predict,
        labels=labels,
        response_index=owner,
        last_index=last,
        token_uses=attention_mask,
        responses=len(rows),
    )


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
    if not example["prompt_ids"]:
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
