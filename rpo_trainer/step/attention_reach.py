"""How far each layer's attention reaches, learned from the masks that the model itself makes.

In a packed row the plan stands in for the masks of transformers. What a mask says beside "causal" (a sliding
window, chunks) must not get lost with it, and neither the config nor the arguments of the attention function
say it reliably: some families have it in the mask alone. So the model runs once on a few tokens, its masks
are recorded when they are made, and each attention module is told what its mask allows, at any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rpo_trainer.step.batch import Reach, sees

# Arguments with tensors that an attention function may leave alone.
_NOT_READ = frozenset({"position_ids", "position_embeddings", "cache_position", "packing_plan"})


@dataclass
class Recording:
    """What the attention modules were called with in one forward.

    Attributes:
        reaches: of each module.
        unplanned: modules that the plan does not reach as an argument.
        problems: what a plan cannot stand in for.
        selecting: those of them by which tokens are selected for a query, which a few tokens cannot show.
        masks: what was made in this forward, with the reach of each.
        counting: modules that number the tokens of a row by themselves, whatever their positions are.
    """

    reaches: dict[nn.Module, Reach] = field(default_factory=dict)
    unplanned: list[nn.Module] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    selecting: list[str] = field(default_factory=list)
    counting: list[nn.Module] = field(default_factory=list)
    masks: list[tuple[Tensor, Reach | None]] = field(default_factory=list)

    def note(self, module: nn.Module, mask: Any, arguments: dict[str, Any]) -> None:
        """One call of the attention function."""
        reach = self._reach(mask) if isinstance(mask, Tensor) else None
        name = type(module).__name__
        if reach is None:
            self.selecting.append(
                f"{name} is called with a mask that is not the model's causal mask"
            )
        elif self.reaches.setdefault(module, reach) != reach:
            self.selecting.append(f"{name} is called with several masks")
        for key, value in arguments.items():
            if isinstance(value, Tensor) and key not in _NOT_READ:
                found = self.problems if value.is_floating_point() else self.selecting
                found.append(f"{name} passes {key} to its attention function")
        if arguments.get("is_causal") is False:
            self.problems.append(f"{name} is not causal")
        if arguments.get("packing_plan") is None:
            self.unplanned.append(module)

    def _reach(self, mask: Tensor) -> Reach | None:
        """Of a mask that was made in this forward, or of a view of all of it."""
        for made, reach in self.masks:
            if made.data_ptr() == mask.data_ptr() and made.shape == mask.shape:
                return reach
        return None

    def finish(self) -> None:
        """Adds the problems that only the whole forward shows."""
        for name in sorted({type(m).__name__ for m in self.counting if m in self.reaches}):
            self.problems.append(f"{name} counts positions from the start of the row")
        self.problems += self.selecting
        if not self.reaches:
            self.problems.append(
                "its attention does not go through an attention function of transformers"
            )


_recording: Recording | None = None


def current_recording() -> Recording | None:
    """The recording that is being made, or None."""
    return _recording


@contextmanager
def recording(attention: str) -> Iterator[Recording]:
    """Within it, masks of models set to the implementation `attention` say how far they reach."""
    global _recording
    masks = AttentionMaskInterface._global_mapping
    known = masks.get(attention)
    masks[attention] = _noted_mask
    _recording = found = Recording()
    try:
        with _Counted(found.counting):
            yield found
        found.finish()
        found.masks.clear()
    finally:
        _recording = None
        if known is None:
            del masks[attention]
        else:
            masks[attention] = known


class _Counted(TorchFunctionMode):
    """Notes the modules in whose own forward `torch.arange` is called."""

    def __init__(self, found: list[nn.Module]) -> None:
        super().__init__()
        self.found = found
        self.running: list[nn.Module] = []
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> Any:
        self.hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(
        self, function: Any, _: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        if function is torch.arange and self.running:
            self.found.append(self.running[-1])
        return function(*arguments, **(settings or {}))


def _noted_mask(*, mask_function: Callable[..., Any], **arguments: Any) -> Tensor:
    """A mask function of transformers: the dense mask, noted with its reach."""
    # Shortcuts leave the mask out where a short text cannot tell the difference.
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Any = sdpa_mask(mask_function=mask_function, **arguments)
    assert _recording is not None
    _recording.masks.append((mask, reach_of(mask_function, arguments.get("local_size"))))
    return mask  # type: ignore[no-any-return]


def reach_of(mask_function: Callable[..., Any], local_size: int | None = None) -> Reach | None:
    """What a mask function of transformers allows; None: something else than a causal mask, window or chunk.

    Args:
        mask_function: `(batch, head, query position, key position)` → whether it sees, of broadcast tensors.
        local_size: the size of its window or chunk, where it has one.
    """
    size = local_size or 0
    ends = {1, 64, 1000, 4096, 32768, 131072, size, 2 * size, 3 * size} - {0}
    places = {end + by for end in ends for by in (-1, 0, 1)}
    queries = torch.tensor(sorted(places))[:, None]
    edges = {place - size + by for place in places for by in (-1, 0, 1)}
    keys = torch.tensor(sorted(n for n in {*range(130), *places, *edges} if n >= 0))[None]
    zero = torch.zeros((), dtype=torch.long)
    try:
        with _OnCpu():
            seen = mask_function(zero, zero, queries, keys)
    except (IndexError, RuntimeError, TypeError):
        return None  # a mask of these very tokens
    candidates = [Reach()]
    if local_size is not None:
        candidates += [Reach(window=local_size), Reach(chunk=local_size)]
    for reach in candidates:
        if torch.equal(seen.expand(len(queries), keys.shape[1]), sees(queries, keys, reach)):
            return reach
    return None


class _OnCpu(TorchFunctionMode):
    """Within it, tensors of another device are read from a copy on the CPU.

    A mask function may hold tensors of the model's device, such as the padding. An index beyond one is an
    error on a CPU; on a GPU it would end the process.
    """

    def __torch_function__(
        self, function: Any, _: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        arguments, settings = tree_map_only(
            Tensor, lambda x: x if x.device.type == "cpu" else x.cpu(), (arguments, settings or {})
        )
        return function(*arguments, **settings)


class RotaryLimit(NamedTuple):
    """Where a rotary embedding changes with the longest text of a forward.

    Attributes:
        kind: of the embedding (`longrope`, `dynamic`).
        positions: of which a longer text changes the angles of all others in its batch.
        remembers: later forwards too see what a longer one has changed.
    """

    kind: str
    positions: int
    remembers: bool


def rotary_limit(model: nn.Module) -> RotaryLimit | None:
    """The limit of a model's rotary embeddings; None: they do not depend on the length of a forward."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        if kinds is None or config is None:
            continue
        parameters = getattr(config, "rope_parameters", None) or {}
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            kind = str(kind)
            if "dynamic" not in kind and kind != "longrope":
                continue
            own = parameters.get(layer, parameters) if isinstance(parameters, dict) else {}
            limit = int(config.max_position_embeddings)
            if kind == "longrope":
                original = own.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                limit = int(original or limit)
            found.append(RotaryLimit(kind, limit, remembers="dynamic" in kind))
    return min(found, key=lambda one: one.positions, default=None)
