"""Memory of one optimizer step and of the reference pass, simulated on fake tensors.

The real model class, packed step, head and optimizer run under `FakeTensorMode`: tensors have shapes but no
memory, and their sizes are summed as they are allocated and freed. The estimate therefore covers any
architecture, adapter or checkpointing, and 340 billion parameters take seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpo_trainer.errors import RecipeError
from rpo_trainer.models.dtypes import cast_frozen
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime import distributed
from rpo_trainer.step.batch import Layout, ModelInputs, PackedBatch
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.logprobs import response_sums
from rpo_trainer.step.packing import pack

# Bytes of state per trained parameter, for optimizers that require a library or a device.
_STATE_BYTES = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw": 8,
    "ademamix_8bit": 3, "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1,
    "adamw_torch_8bit": 2, "adamw_torch_4bit": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes by part on one device without sharding.

    Attributes:
        parameters: all weights, trained and frozen, and buffers.
        gradients: of all trained weights after a backward.
        optimizer: the optimizer's state.
        activations: everything else at the peak: activations saved for the backward and temporaries, logit
            tiles included.
        reference: peak of the reference pass beyond the weights.
        root, layer: weights outside the decoder's layers, and of its largest layer, in float32: what a
            sharding engine gathers at once.
        unsharded: the part of `parameters` in 4 bits, which no engine shards.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    reference: int
    root: int
    layer: int
    unsharded: int = 0


def step_memory(
    make_model: Callable[[torch.dtype], nn.Module],
    micro_batch: Sequence[Mapping[str, Any]],
    *,
    layout: Layout = "shared",
    reference_batch: Sequence[Mapping[str, Any]] = (),
    optim: str = "adamw_torch",
    autocast: torch.dtype | None = None,
    half_weights: bool = False,
    frozen: torch.dtype = torch.float32,
    accumulation: int = 1,
    checkpointing: bool = False,
    logits_chunk_bytes: int | None = None,
) -> StepMemory:
    """Simulate a step on `micro_batch` and the reference pass on `reference_batch`.

    Args:
        make_model: creates the model in a dtype, adapter included; called under `torch.device("meta")`.
        micro_batch: tokenized examples of the costliest forward.
        autocast: dtype of the arithmetic; None: float32.
        half_weights: simulate with all weights in `autocast`, as sharding engines gather them, so that no
            copies in it are kept. Trained weights and their gradients are still reported as float32.
        frozen: dtype that weights below an adapter are held in.
        accumulation: micro-batches of an optimizer step. From 2 on, gradients are held throughout.

    Raises:
        RecipeError: the optimizer's size is not known.
    """
    dtype = autocast if half_weights and autocast is not None else torch.float32
    as_float32 = 4 // dtype.itemsize
    with torch.device("meta"):
        model: Any = make_model(dtype)
        if dtype == torch.float32:
            cast_frozen(model, frozen)
    with _fake() as mode:
        _give_fake_weights(model)
        if checkpointing:
            _checkpoint_activations(model)
        install(model, layout=layout, learn=False)
        inner = transformers_model(model)
        if logits_chunk_bytes is not None:
            inner._rpo_head.logits_chunk_bytes = logits_chunk_bytes
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(map(_bytes, trained))

        def run(batch: PackedBatch) -> Tensor:
            with _autocast(autocast):
                logps = token_logprobs(model, _inputs(mode, batch.model_inputs))
            if is_classifier(model):
                return logps  # scores of a reward model
            index = mode.from_tensor(batch.response_index)
            return response_sums(logps, index, len(batch.response_tokens))

        batch = pack(micro_batch, layout)
        optimizer = _optimizer(optim, trained)
        with _Held() as held:
            for _ in range(min(accumulation, 2)):
                torch.autograd.backward(run(batch).sum())
        activations = held.peak - gradients
        state = _STATE_BYTES.get(optim, 0) * sum(p.numel() for p in trained)
        if optimizer is not None:
            optimizer.step()
            state = sum(map(_bytes_in_float32, _state(optimizer)))
            with _Held() as held:  # its temporaries may exceed the activations
                optimizer.step()
            activations = max(activations, held.peak * as_float32)
        reference = 0
        if reference_batch:
            for parameter in trained:
                parameter.grad = None
            with _Held() as held, torch.no_grad():
                run(pack(reference_batch, layout))
            reference = held.peak
        layers = _layers(inner)
        unsharded = sum(_bytes(p) for p in model.parameters() if not p.is_floating_point())
        return StepMemory(
            parameters=_held(model, frozen) + unsharded,
            gradients=sum(map(_bytes_in_float32, trained)),
            optimizer=state,
            activations=activations,
            reference=reference,
            root=_held(inner) - sum(map(_held, layers)),
            layer=max(map(_held, layers), default=0),
            unsharded=unsharded,
        )


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Return the bytes of the optimizer's state after a step; the model is on `meta`, in float32.

    Raises:
        RecipeError: the optimizer's size is not known.
    """
    with _fake():
        _give_fake_weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = _optimizer(optim, trained)
        if optimizer is None:
            return _STATE_BYTES[optim] * sum(p.numel() for p in trained)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        return sum(map(_bytes, _state(optimizer)))


@contextmanager
def _fake() -> Iterator[FakeTensorMode]:
    """Create tensors without values inside this context; small tensors of the plan may be real."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def _give_fake_weights(model: nn.Module) -> None:
    """Replace `meta` tensors of a model by fake CPU tensors."""
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        held = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in held:
            if tensor not in made:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                made[tensor] = fake
            setattr(module, name, made[tensor])


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the bytes of live tensors created inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(_storage(tensor), before)
        return out

    def _add(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._known:
            return  # a view, or an in-place operation
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _inputs(mode: FakeTensorMode, inputs: ModelInputs) -> ModelInputs:
    """Convert the inputs to fake tensors; those of the attention plan stay real."""
    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    fake: Any = {name: mode.from_tensor(value) for name, value in tensors.items()}
    return replace(inputs, **fake)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_in_float32(tensor: Tensor) -> int:
    """Return bytes with half precision counted as float32."""
    return max(4, tensor.element_size()) * tensor.numel()


def _held(module: nn.Module, frozen: torch.dtype = torch.float32) -> int:
    """Return the bytes of weights and buffers, tied ones once, without those in 4 bits.

    Trained weights and buffers count as float32, frozen weights as `frozen`.
    """
    floats = [p for p in module.parameters() if p.is_floating_point()]
    held: list[Tensor] = [p for p in floats if p.requires_grad]
    held += [b for b in module.buffers() if b.is_floating_point()]
    below = [p for p in floats if not p.requires_grad]
    return sum(map(_bytes_in_float32, held)) + frozen.itemsize * sum(p.numel() for p in below)


def _checkpoint_activations(model: Any) -> None:
    # Renamed in transformers; the old name warns in new releases.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _layers(model: Any) -> list[nn.Module]:
    """Return the decoder's layers: the longest list of modules in the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _optimizer(optim: str, weights: list[nn.Parameter]) -> Any:
    """Create an optimizer by its name in transformers; None if only the size of its state is known.

    Raises:
        RecipeError: it cannot be created here, and its size is not known.
    """
    if optim in _STATE_BYTES:
        return None
    from transformers import Trainer, TrainingArguments

    try:
        with distributed.preserve_process_state():  # the process itself may use a GPU
            args = TrainingArguments(output_dir="unused", optim=optim, use_cpu=True)
        factory, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        return factory(weights, **settings)
    except (ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"the memory of optimizer {optim!r} cannot be estimated",
            code="plan.unknown-optimizer",
            where="optim",
            why=f"the optimizer cannot be created: {error}",
            fix="install its library, or plan with another optimizer",
        ) from error


def _state(optimizer: Any) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in states if isinstance(value, Tensor)]
