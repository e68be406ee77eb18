"""What a step consumes: one packed row per micro-batch, its index tensors, and who sees whom in it.

`rpo_trainer.step.packing` makes them of tokenised examples; `Layout` names the ways to pack.

Shapes: `B` examples, `R` responses of the micro-batch in order (example 1's, example 2's, ...), `T` tokens of
the packed row, `N` trained response tokens, `E` experts, `L` longest padded row.

Position ids restart after the prompt for every response, so a response sees its prompt and itself and
never its siblings; `AttentionPlan` says so to the attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from rpo_trainer.step.attention_flex import FlexIndex
from rpo_trainer.step.attention_varlen import VarlenIndex
from rpo_trainer.step.token_stats import TokenStats

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
        stats: gets the statistics of the trained tokens' distributions; None: none are computed.
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
