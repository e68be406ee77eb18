"""Inputs of a step: one packed row per micro-batch, its index tensors, and its attention plan.

`rpo_trainer.step.packing` creates them from tokenized examples; `Layout` names the step layouts.

Shapes: `B` examples, `R` responses of the micro-batch in order (those of example 1, of example 2, ...), `T`
tokens of the packed row, `N` trained response tokens, `E` experts, `L` length of the longest padded row.

The position ids of every response continue those of its prompt. A response attends to its prompt and
itself, but to no other response, which `AttentionPlan` defines for the attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from rpo_trainer.runtime.devices import move
from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.attention_varlen import VarlenIndex
from rpo_trainer.step.token_stats import TokenStats

Layout = Literal["shared", "packed", "padded", "single"]


class Reach(NamedTuple):
    """Visible positions up to the query's own: all, the last `window`, or those of its chunk."""

    window: int | None = None
    chunk: int | None = None


class Segment(NamedTuple):
    """Queries `[start, stop)` attend to keys `[prefix_start, prefix_stop)`, and causally to themselves."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


# Up to this size a dense mask over several short examples is cheaper than a kernel call for each.
_DENSE_TOKENS = 256


@dataclass
class AttentionPlan:
    """Visibility of the tokens of a packed row: segments that tile the row in order.

    Attributes:
        segments: prompt + response for the first response of an example; for every further response the
            response alone, with the prompt as its prefix.
        index: the segments for the variable-length kernel; None if only units are used.
        flex_index: the segments for FlexAttention; None if only units are used.
    """

    segments: tuple[Segment, ...]
    index: VarlenIndex | None = field(default=None, repr=False, compare=False)
    flex_index: FlexIndex | None = field(default=None, repr=False, compare=False)
    _masks: dict[tuple[int, Reach], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _chunked: dict[int, VarlenIndex | None] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device, non_blocking: bool = False) -> AttentionPlan:
        """Return the plan with its tensors on a device."""
        return self.map(lambda tensor: move(tensor, device, non_blocking))

    def pin_memory(self) -> AttentionPlan:
        """Return the plan with its tensors in pinned memory; called by data loaders."""
        return self.map(Tensor.pin_memory)

    def map(self, move: Callable[[Tensor], Tensor]) -> AttentionPlan:
        """Return the plan with `move` applied to all tensors, and without cached masks."""
        return replace(
            self,
            index=self.index and self.index.map(move),
            flex_index=self.flex_index and self.flex_index.map(move),
            _masks={},
            _chunked={},
        )

    @cached_property
    def units(self) -> tuple[tuple[Segment, ...], ...]:
        """Groups of segments for one kernel call each: several short examples, or a single segment."""
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
                and not units[-1][
                    0
                ].prefix_stop  # part of a long example, with its prompt elsewhere
                and example[-1].stop - units[-1][0].start <= _DENSE_TOKENS
            ):
                units[-1] += example
            else:
                units.append(list(example))
        return tuple(map(tuple, units))

    def mask(self, number: int, reach: Reach, device: torch.device) -> Tensor:
        """Return the mask of unit `number`, computed once per step for all layers.

        Args:
            reach: visible positions.

        Returns:
            `[queries, keys]`, True if the key is visible. The keys are the tokens of the unit, preceded by
            the prefix if the unit is a single segment with a prefix.
        """
        if (number, reach) not in self._masks:
            unit = self.units[number]
            # Created on the device: a copy from the host would block.
            make = _dense_mask if len(unit) > 1 else _single_mask
            self._masks[number, reach] = make(unit, reach, device)
        return self._masks[number, reach]

    def chunk_index(self, chunk: int, device: torch.device) -> VarlenIndex | None:
        """Return the index for attention in chunks of `chunk` positions; segments are split at chunk ends."""
        if chunk not in self._chunked:
            index = VarlenIndex.of(_cut(self.segments, chunk))
            self._chunked[chunk] = index and index.map(lambda tensor: tensor.to(device))
        return self._chunked[chunk]


def _cut(segments: Sequence[Segment], chunk: int) -> list[Segment]:
    """Split the segments at multiples of `chunk` positions, with the part of the prefix in the same chunk."""
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
    """Whether a query attends to a key of the same text, given their positions, which are broadcast."""
    distance = query_position - key_position
    seen = distance >= 0
    if reach.window is not None:
        seen = seen & (distance < reach.window)
    if reach.chunk is not None:
        seen = seen & (query_position // reach.chunk == key_position // reach.chunk)
    return seen


# --- inputs of a step ---

M = TypeVar("M", bound="TensorStruct")


@dataclass
class TensorStruct:
    """A dataclass of tensors and other values with operations on all tensors; dtypes are kept."""

    def map(self: M, move: Callable[[Tensor], Tensor]) -> M:
        """Return a copy with `move` applied to all tensors."""
        return replace(self, **{f.name: _mapped(getattr(self, f.name), move) for f in fields(self)})

    def to(self: M, device: torch.device, non_blocking: bool = True) -> M:
        """Return a copy with its tensors on a device."""
        return self.map(lambda tensor: move(tensor, device, non_blocking))

    def pin_memory(self: M) -> M:
        """Return a copy in pinned memory; called by data loaders."""
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
    """Request for router sums from a forward, see `rpo_trainer.step.router_loss`.

    Attributes:
        top_k: number of experts per token.
        layers: expected number of routers.
        only: return nothing but the sums.
        sums: result, `[2E + 1]`; None before the forward.
    """

    top_k: int
    layers: int
    only: bool
    sums: Tensor | None = None


@dataclass
class ModelInputs(TensorStruct):
    """Inputs of the model's forward, `model(packed=...)`.

    Attributes:
        input_ids, position_ids: `[1, T]` or `[R, L]`.
        attention_mask: `[R, L]` in layout padded, otherwise None.
        plan: attention plan in layouts shared and packed, otherwise None.
        rows: (start, stop) of each prompt + response in layout single, otherwise None.
        predict_index: `[N]`, flat index of the hidden state that predicts each trained token.
        labels: `[N]`, the trained tokens.
        last_index: `[R]`, flat index of each response's last token.
        token_uses: shape of `input_ids`, int64: number of responses that use each token, 0 for padding.
        router: request for router sums, or None.
        stats: receives the statistics of the trained tokens' distributions; None: none are computed.
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
    stats: TokenStats | None = None


@dataclass
class PackedBatch(TensorStruct):
    """One micro-batch.

    Attributes:
        model_inputs: inputs of the model's forward.
        response_index: `[N]`, response of each trained token.
        response_tokens: `[R]`, number of trained tokens of each response.
        groups: `[b, k]` response indices of the examples with k responses, one tensor for each k.
        example_order: B example indices in the order of the groups.
        rewards, reference_logps: `[R]` float32 if the examples have them, otherwise None.
        ids: B row ids.
        weights: `[B]` in the order of the groups; 0 for the filler of a rank without an example.
        counts: `[2]` float64: number of examples, and of trained tokens of their first (chosen) responses;
            0 for a filler.
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
        """The batch itself, for the interface of `StepBatch`."""
        return (self,)

    def num_tokens(self, *, padding: bool) -> int:
        """Return the number of tokens of the forward, computed on the host.

        Args:
            padding: also count padding and fillers.
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
    """All micro-batches of an optimizer step on this rank, and the sum of their counts."""

    micro_batches: tuple[PackedBatch, ...]
    counts: Tensor

    def num_tokens(self, *, padding: bool) -> int:
        """Return the number of tokens of all forwards."""
        return sum(batch.num_tokens(padding=padding) for batch in self.micro_batches)
