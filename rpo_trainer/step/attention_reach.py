"""Determine how far the attention of each layer reaches, from the masks that the model creates.

In a packed row the plan replaces the masks of transformers. Other properties of a mask than "causal" (a
sliding window, chunks) must be preserved. Neither the config nor the arguments of the attention function
are reliable, since in some families only the mask has this information. So the model runs once on a few
tokens, its masks are recorded, and the reach of each mask, for any length, is stored on the attention
module.
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

# Tensor arguments that an attention function may ignore.
_NOT_READ = frozenset({"position_ids", "position_embeddings", "cache_position", "packing_plan"})


@dataclass
class Recording:
    """Arguments of the attention modules in one forward.

    Attributes:
        reaches: reach of each module.
        unplanned: modules that did not receive the plan as an argument.
        problems: properties that a plan cannot represent.
        selecting: those that select tokens for a query, whose effect may not show with a few tokens.
        masks: the masks created in this forward, with their reaches.
        counting: modules that number the tokens of a row themselves, regardless of their position ids.
    """

    reaches: dict[nn.Module, Reach] = field(default_factory=dict)
    unplanned: list[nn.Module] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    selecting: list[str] = field(default_factory=list)
    counting: list[nn.Module] = field(default_factory=list)
    masks: list[tuple[Tensor, Reach | None]] = field(default_factory=list)

    def note(self, module: nn.Module, mask: Any, arguments: dict[str, Any]) -> None:
        """Record one call of the attention function."""
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
        """Return the reach of a mask created in this forward, or of a view of all of it."""
        for known, reach in self.masks:
            if known.data_ptr() == mask.data_ptr() and known.shape == mask.shape:
                return reach
        return None

    def finish(self) -> None:
        """Add the problems that are known only after the forward."""
        for name in sorted({type(m).__name__ for m in self.counting if m in self.reaches}):
            self.problems.append(f"{name} counts positions from the start of the row")
        self.problems += self.selecting
        if not self.reaches:
            self.problems.append(
                "its attention does not use the attention functions of transformers"
            )


_recording: Recording | None = None


def current_recording() -> Recording | None:
    """Return the active recording, or None."""
    return _recording


@contextmanager
def recording(attention: str) -> Iterator[Recording]:
    """Record the masks of models with the attention implementation `attention`."""
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
    """Records the modules whose own forward calls `torch.arange`."""

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
    """Mask function for transformers: create the dense mask, and record it with its reach."""
    # With these shortcuts transformers omits masks that make no difference for a short text.
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Any = sdpa_mask(mask_function=mask_function, **arguments)
    assert _recording is not None
    _recording.masks.append((mask, reach_of(mask_function, arguments.get("local_size"))))
    return mask  # type: ignore[no-any-return]


def reach_of(mask_function: Callable[..., Any], local_size: int | None = None) -> Reach | None:
    """Return the reach of a mask function of transformers; None if it is not a causal mask, window or chunk.

    Args:
        mask_function: `(batch, head, query position, key position)` → whether the key is visible, for
            broadcast tensors.
        local_size: size of its window or chunk, if any.
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
        return None  # the mask depends on the tokens
    candidates = [Reach()]
    if local_size is not None:
        candidates += [Reach(window=local_size), Reach(chunk=local_size)]
    for reach in candidates:
        if torch.equal(seen.expand(len(queries), keys.shape[1]), sees(queries, keys, reach)):
            return reach
    return None


class _OnCpu(TorchFunctionMode):
    """Replaces tensors on other devices by copies on the CPU.

    A mask function may use tensors on the model's device, such as the padding mask. An index out of range
    raises an exception on a CPU, but terminates the process on a GPU.
    """

    def __torch_function__(
        self, function: Any, _: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        arguments, settings = tree_map_only(
            Tensor, lambda x: x if x.device.type == "cpu" else x.cpu(), (arguments, settings or {})
        )
        return function(*arguments, **settings)


class RotaryLimit(NamedTuple):
    """Length from which a rotary embedding depends on the longest text of a forward.

    Attributes:
        kind: type of the embedding (`longrope`, `dynamic`).
        positions: a text with more positions changes the angles of all others in its batch.
        remembers: the change persists in later forwards.
    """

    kind: str
    positions: int
    remembers: bool


def rotary_limit(model: nn.Module) -> RotaryLimit | None:
    """Return the limit of a model's rotary embeddings; None if they do not depend on the text length."""
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
