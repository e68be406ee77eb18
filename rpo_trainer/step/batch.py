"""Tokenised examples → one packed row per micro-batch, with the index tensors the step needs.

Shapes: `B` examples, `R` responses of the micro-batch in order (example 1's, example 2's, ...), `T` tokens of
the packed row, `N` trained response tokens, `L` longest padded row.

A tokenised example is a mapping with `prompt_ids` `[p]`, `response_ids` K lists, `response_mask` K lists
(1 = trained), and for preferences `rewards` and `reference_logps`, K numbers each. Four layouts:

    shared   [1, T]  prompt, response 1, ..., response K, next example      (the prompt once per example)
    packed   [1, T]  prompt, response 1, prompt, response 2, ...            (nothing shared)
    padded   [R, L]  one row per response, padded on the right              (any model that ignores padding)
    single   [1, T]  as packed, but each response goes through the model in a forward of its own

Position ids restart behind the prompt for every response, so a response sees its prompt and itself and
never its siblings; `AttentionPlan` says so to the attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.attention_varlen import VarlenIndex

Layout = Literal["shared", "packed", "padded", "single"]


class Reach(NamedTuple):
    """What a query sees of the positions up to its own: all, the last `window`, or those of its chunk."""

    window: int | None = None
    chunk: int | None = None


class Segment(NamedTuple):
    """Queries `[start, stop)` see keys `[prefix_start, prefix_stop)` whole and themselves causally."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


# Up to here a dense mask over several short examples costs less than a kernel call for each.
_DENSE_TOKENS = 256


@dataclass
class AttentionPlan:
    """Which tokens of a packed row see which: segments that tile the row in order.

    Attributes:
        segments: for the first response of an example prompt + response; for each further one the
            response alone, with the prompt as its prefix.
        index: the same for the kernel that takes all segments in one call; None: only units.
        flex_index: the same for FlexAttention; None: only units.
    """

    segments: tuple[Segment, ...]
    index: VarlenIndex | None = field(default=None, repr=False, compare=False)
    flex_index: FlexIndex | None = field(default=None, repr=False, compare=False)
    _masks: dict[tuple[int, Reach], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _chunked: dict[int, VarlenIndex | None] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device, non_blocking: bool = False) -> AttentionPlan:
        """The plan with its tensors on the device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionPlan:
        """The plan with its tensors where the device can fetch them by itself; a data loader asks for it."""
        return self.map(Tensor.pin_memory)

    def map(self, move: Callable[[Tensor], Tensor]) -> AttentionPlan:
        """The plan with every tensor moved, and without the masks made so far."""
        return replace(
            self,
            index=self.index and self.index.map(move),
            flex_index=self.flex_index and self.flex_index.map(move),
            _masks={},
            _chunked={},
        )

    @cached_property
    def units(self) -> tuple[tuple[Segment, ...], ...]:
        """Runs of segments that one kernel call does: short examples together, else one alone."""
        examples: list[list[Segment]] = []
        for segment in self.segments:
            if segment.prefix_stop > segment.prefix_start:
                examples[-1].append(segment)
            else:
                examples.append([segment])
        units: list[list[Segment]] = []
        for example in examples:
            if example[-1].stop - example[0].start > _DENSE_TOKENS:
                units += [[segment] for segment in example]
            elif (
                units
                and not units[-1][0].prefix_stop  # of a long example: its prompt lies elsewhere
                and example[-1].stop - units[-1][0].start <= _DENSE_TOKENS
            ):
                units[-1] += example
            else:
                units.append(list(example))
        return tuple(map(tuple, units))

    def mask(self, number: int, reach: Reach, device: torch.device) -> Tensor:
        """Who sees whom in unit `number`, made once a step and used by every layer.

        Args:
            reach: how far back a query sees, by position.

        Returns:
            `[queries, keys]`, True where a query sees a key; the keys are the unit's own tokens, behind
            the prefix where the unit is a single segment that has one.
        """
        if (number, reach) not in self._masks:
            unit = self.units[number]
            # On the device itself: a copy from the host would have it wait.
            make = _dense_mask if len(unit) > 1 else _single_mask
            self._masks[number, reach] = make(unit, reach, device)
        return self._masks[number, reach]

    def chunk_index(self, chunk: int, device: torch.device) -> VarlenIndex | None:
        """`index` of attention in chunks of `chunk` positions: every segment cut where a chunk ends."""
        if chunk not in self._chunked:
            index = VarlenIndex.of(_cut(self.segments, chunk))
            self._chunked[chunk] = index and index.map(lambda tensor: tensor.to(device))
        return self._chunked[chunk]


def _cut(segments: Sequence[Segment], chunk: int) -> list[Segment]:
    """The segments, cut at multiples of `chunk` positions, each with what its chunk has of the prefix."""
    pieces = []
    for start, stop, prefix_start, prefix_stop in segments:
        prefix = prefix_stop - prefix_start
        first = prefix  # position of the piece's first token
        while first < prefix + stop - start:
            begin = first // chunk * chunk
            last = min(begin + chunk, prefix + stop - start)
            own = (start + first - prefix, start + last - prefix)
            pieces.append(
                Segment(*own, prefix_start + begin, prefix_stop)
                if begin < prefix
                else Segment(*own)
            )
            first = last
    return pieces


def _single_mask(unit: tuple[Segment, ...], reach: Reach, device: torch.device) -> Tensor:
    start, stop, prefix_start, prefix_stop = unit[0]
    position = torch.arange(prefix_stop - prefix_start + stop - start, device=device)
    return sees(position[prefix_stop - prefix_start :, None], position[None], reach)


def _dense_mask(unit: tuple[Segment, ...], reach: Reach, device: torch.device) -> Tensor:
    origin, tokens = unit[0].start, unit[-1].stop - unit[0].start
    mask = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
    for start, stop, prefix_start, prefix_stop in unit:
        prefix = prefix_stop - prefix_start
        position = torch.arange(prefix, prefix + stop - start, device=device)[:, None]
        own = slice(start - origin, stop - origin)
        mask[own, own] = sees(position, position.T, reach)
        if prefix:
            keys = slice(prefix_start - origin, prefix_stop - origin)
            mask[own, keys] = sees(position, torch.arange(prefix, device=device)[None], reach)
    return mask


def sees(query_position: Tensor, key_position: Tensor, reach: Reach) -> Tensor:
    """Whether a query sees a key of its own text, by their positions, broadcast against each other."""
    behind = query_position - key_position
    seen = behind >= 0
    if reach.window is not None:
        seen = seen & (behind < reach.window)
    if reach.chunk is not None:
        seen = seen & (query_position // reach.chunk == key_position // reach.chunk)
    return seen


# --- what a step consumes ---

M = TypeVar("M", bound="TensorStruct")


@dataclass
class TensorStruct:
    """A dataclass of tensors and other values, which moves whole; dtypes stay as they are."""

    def map(self: M, move: Callable[[Tensor], Tensor]) -> M:
        """The same with every tensor moved."""
        return replace(self, **{f.name: _mapped(getattr(self, f.name), move) for f in fields(self)})

    def to(self: M, device: torch.device, non_blocking: bool = True) -> M:
        """The same with its tensors on the device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: M) -> M:
        """The same where the device can fetch it by itself; a data loader asks for it."""
        return self.map(Tensor.pin_memory)


def _mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (TensorStruct, AttentionPlan)):
        return value.map(move)
    if isinstance(value, tuple):
        return tuple(_mapped(part, move) for part in value)
    return value


@dataclass
class RouterRequest:
    """What a forward is to give of its routers beside its answer, see `rpo_trainer.step.router_loss`.

    Attributes:
        top_k: experts that a token chooses.
        layers: routers that the forward is expected to record.
        only: whether nothing else is wanted of the forward.
        sums: what it has given, `[2E + 1]`; None before it.
    """

    top_k: int
    layers: int
    only: bool
    sums: Tensor | None = None


@dataclass
class ModelInputs(TensorStruct):
    """What the model's forward takes, as `model(packed=...)`.

    Attributes:
        input_ids, position_ids: `[1, T]` or `[R, L]`.
        attention_mask: `[R, L]`; None when packed.
        plan: who sees whom; None when padded or single.
        rows: where each response's text starts and stops; None but for single.
        predict_index: `[N]`, the flat position whose hidden state predicts each trained token.
        labels: `[N]`, that token.
        last_index: `[R]`, the flat position of each response's last token.
        token_uses: as `input_ids`, int64: how many responses use each token, 0 for padding.
        router: what the forward is to give of its routers; None: nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    plan: AttentionPlan | None
    rows: tuple[tuple[int, int], ...] | None
    predict_index: Tensor
    labels: Tensor
    last_index: Tensor
    token_uses: Tensor
    router: RouterRequest | None = None


@dataclass
class PackedBatch(TensorStruct):
    """One micro-batch.

    Attributes:
        model_inputs: what the model's forward takes.
        response_index: `[N]`, which of the R responses a token belongs to.
        response_tokens: `[R]`, trained tokens of each response.
        groups: `[b, k]` response numbers of the examples that have k responses, one tensor for each k.
        example_order: example numbers in the order of the groups, B of them.
        rewards, reference_logps: `[R]` float32, where the examples have them, else None.
        ids: row ids, B of them.
        weights: `[B]` in the order of the groups; 0 for the filler of a rank that has no example left.
        counts: `[2]` float64: examples, and trained tokens of their first (chosen) responses; 0 for a filler.
    """

    model_inputs: ModelInputs
    response_index: Tensor
    response_tokens: Tensor
    groups: tuple[Tensor, ...]
    example_order: list[int]
    rewards: Tensor | None
    reference_logps: Tensor | None
    ids: list[str]
    weights: Tensor
    counts: Tensor

    @property
    def micro_batches(self) -> tuple[PackedBatch, ...]:
        """Itself alone, as `StepBatch` has several."""
        return (self,)

    def num_tokens(self, *, padding: bool) -> int:
        """Tokens of the forward; on the host, nothing waits for a device.

        Args:
            padding: whether padding counts, and a filler.
        """
        inputs = self.model_inputs
        if padding:
            return inputs.input_ids.numel()
        if not bool(self.weights.any()):
            return 0
        mask = inputs.attention_mask
        return int(inputs.input_ids.numel() if mask is None else mask.sum())


@dataclass
class StepBatch(TensorStruct):
    """All micro-batches of an optimizer step of this rank, and the sum of their counts."""

    micro_batches: tuple[PackedBatch, ...]
    counts: Tensor

    def num_tokens(self, *, padding: bool) -> int:
        """Tokens of all forwards."""
        return sum(batch.num_tokens(padding=padding) for batch in self.micro_batches)


def forward_tokens(example: Mapping[str, Any], layout: Layout) -> int:
    """Number of tokens the model has to process for an example: its cost, up to attention."""
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
    """One micro-batch of tokenised examples as tensors.

    Args:
        filler: whether the examples only keep the forwards of the ranks alike, and have weight 0.
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
            # The token before the first one of a response is its prompt's last, wherever that lies.
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
    """Examples by their number of responses, so that each loss call sees a full `[b, k]`."""
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
    """An example that does not fit itself would be packed into something else without a word."""
    responses = example["response_ids"]
    fault = None
    if not example["prompt_ids"]:
        fault = "an empty prompt, so nothing predicts the first token"
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
