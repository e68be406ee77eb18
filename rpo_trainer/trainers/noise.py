"""Noise of a model in training: dropout, layer drop, router jitter, sampled experts.

Named noise is set to 0 wherever a model family keeps it: in an `nn.Dropout`, an attribute of a module, or a
field of a config that a forward reads. Two forwards then show whether any noise is left; modules that still
draw random numbers are kept in eval mode.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rpo_trainer.models.sharding import device_of
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.runtime.distributed import is_main

logger = logging.getLogger(__name__)

_NAMES = re.compile(r"drop|jitter|noise")
_OF_OTHER_HEADS = ("summary_", "classifier_")
_DROPOUT = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)  # fmt: skip


# --- names and values ---


def noise_of(config: Any) -> str:
    """Return the noise of the decoder in a configuration, as `name value, ...`; empty if none."""
    return text_of(dict(_fields(config.get_text_config().to_dict())))


def text_of(found: Mapping[str, float]) -> str:
    """Return `name value, ...`, sorted."""
    return ", ".join(f"{name} {value:g}" for name, value in sorted(found.items()))


def _name_of(path: str) -> str:
    """Return the name of a dropout module: the last part of its path, or that of its container.

    PEFT has one dropout per adapter, in `lora_dropout.ADAPTER`.
    """
    *_, parent, last = ("", *path.split("."))
    return parent if "dropout" in parent and "drop" not in last else last


def noise_in(model: nn.Module) -> dict[str, float]:
    """Return the names and largest values of the noise of the model's modules."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        values = {name: getattr(module, name) for name in _attributes(module)}
        if isinstance(module, _DROPOUT) and module.p > 0:
            values[_name_of(path)] = module.p
        for config, names in _configs(module):
            values |= {name: getattr(config, name) for name in names}
        for name, value in values.items():
            found[name] = max(value, found.get(name, 0.0))
    return found


def _fields(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        elif _is_noise(name, value):
            yield name, value


def _is_noise(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not isinstance(value, float):  # keys may be ints (labels)
        return False
    return bool(_NAMES.search(name)) and not name.startswith(_OF_OTHER_HEADS) and value > 0


def _attributes(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if _is_noise(name, value)]


def _configs(module: nn.Module) -> Iterator[tuple[PreTrainedConfig, list[str]]]:
    """Yield the configs of a module, and the names of noise in each that its methods read."""
    for config in vars(module).values():
        if isinstance(config, PreTrainedConfig):
            source = _source(type(module))  # type: ignore[arg-type]
            fields = [n for n, v in vars(config).items() if _is_noise(n, v)]
            aliases = {n: a for n, a in config.attribute_map.items() if a in fields}
            names = [n for n in (*fields, *aliases) if re.search(rf"config\.{n}\b", source)]
            if names := [n for n in names if getattr(config, n)]:
                yield config, names


@functools.cache
def _source(cls: type) -> str:
    """Return the source of the methods of a class, without its constructor."""
    found = []
    for base in cls.__mro__[:-1]:
        if any(base is stop for stop in (nn.Module, PreTrainedModel, GradientCheckpointingLayer)):
            break
        for name, method in vars(base).items():
            if isinstance(method, types.FunctionType) and name != "__init__":
                try:
                    found.append(inspect.getsource(method))
                except OSError:  # there is no source file
                    continue
    return "\n".join(found)


# --- turning it off ---


def disable_noise(model: nn.Module, why: str) -> None:
    """Turn off all noise of a model in training, with a WARNING that names it.

    The config that is saved with the model keeps its values. Values that also matter in eval mode are part of
    the model's function (`router_jitter_noise` of Phi-3.5-MoE), and are kept.

    Args:
        model: the model; if it is sharded, called on all ranks.
        why: reason for the warning.
    """
    found = noise_in(model)
    undo = _set_noise_to_zero(model, found)
    if found:
        without = _forward(model, 0, training=False)
        _restore(undo)
        if not _same(without, lambda: _forward(model, 0, training=False)):
            for name in [name for name in found if _matters_in_eval(model, name)]:
                del found[name]
        _set_noise_to_zero(model, found)
    in_eval = _keep_in_eval(model)
    still_noisy = is_noisy(model)
    if not is_main():
        return
    if found:
        logger.warning(
            "disabled dropout or other noise in training (%s), because %s", text_of(found), why
        )
    if in_eval:
        logger.warning(
            "the model draws random numbers in %s: these modules are kept in eval mode, because %s",
            ", ".join(in_eval),
            why,
        )
    if still_noisy:
        logger.warning(
            "two forwards of the model in training differ: it has noise that cannot be turned off, although "
            "%s",
            why,
        )  # fmt: skip


_Undo = list[tuple[Any, str, Any]]


def _set_noise_to_zero(model: nn.Module, names: Collection[str]) -> _Undo:
    """Set noise of these names to 0, and return the previous values."""
    inner, undo = transformers_model(model), []
    for path, module in model.named_modules():
        changes: dict[str, Any] = {name: 0.0 for name in _attributes(module) if name in names}
        if isinstance(module, _DROPOUT) and _name_of(path) in names:
            changes["p"] = 0.0
        for config, read in _configs(module):
            if module is not inner and (hidden := tuple(name for name in read if name in names)):
                attribute = next(name for name, value in vars(module).items() if value is config)
                changes[attribute] = _zeroed_view(config, hidden)
        undo += [(module, name, getattr(module, name)) for name in changes]
        for name, value in changes.items():
            setattr(module, name, value)
    return undo


def _restore(undo: _Undo) -> None:
    for module, name, value in undo:
        setattr(module, name, value)


def _matters_in_eval(model: nn.Module, name: str) -> bool:
    """Whether noise of this name changes what the model computes in eval mode."""
    before = _forward(model, 0, training=False)
    undo = _set_noise_to_zero(model, [name])
    same = _same(before, lambda: _forward(model, 0, training=False))
    _restore(undo)
    return not same


def _zeroed_view(config: PreTrainedConfig, names: tuple[str, ...]) -> PreTrainedConfig:
    """Return a view of a config in which some fields are 0; later changes of the config are visible."""
    cls = type(config)
    fields: dict[str, Any] = {
        "__class__": property(lambda self: cls),
        # A copy of the model gets a view of its own config.
        "__reduce_ex__": lambda self, protocol: (_zeroed_view, (config, names)),
        **{name: property(lambda self: 0.0) for name in names},
    }
    view: PreTrainedConfig = object.__new__(type(cls.__name__, (cls,), fields))
    object.__setattr__(view, "__dict__", vars(config))
    return view


def log_noise(model: nn.Module) -> None:
    """Log the noise of a model in training."""
    found = noise_in(model)
    if found and is_main():
        logger.info("noise in training: %s", text_of(found))


# --- forwards that show noise ---


def is_noisy(model: nn.Module) -> bool:
    """Whether two forwards in training differ because of random numbers.

    Args:
        model: a model that is not sharded.
    """
    first, second = _forward(model, 0), _forward(model, 1)
    return not _same(second, lambda: _forward(model, 0), first)


def _same(expected: Tensor, forward: Callable[[], Tensor], found: Tensor | None = None) -> bool:
    """Whether a forward pass has the expected result, up to nondeterministic kernels."""
    found = forward() if found is None else found
    if torch.equal(found, expected):
        return True
    return _distance(found, expected) <= 10 * _distance(found, forward())


def is_deterministic(model: nn.Module) -> bool:
    """Whether two forwards in eval mode are equal."""
    return torch.equal(_forward(model, 0, False), _forward(model, 1, False))


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _forward(model: nn.Module, seed: int, training: bool = True) -> Tensor:
    """Return the logits (or scores of a classifier) for a few tokens, with a given seed."""
    inner = transformers_model(model)
    device, before = device_of(model), model.training
    ids = (
        torch.arange(1, 17, device=device).reshape(2, 8) % inner.config.get_text_config().vocab_size
    )
    devices = [device] if device.type == "cuda" else []
    model.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(before)
    return logits.float()


def _keep_in_eval(model: nn.Module) -> list[str]:
    """Keep modules that draw random numbers in eval mode, and return the names of their classes."""
    names = set()
    for module in _drawing(model):
        # These recompute their activations only if `training` is set.
        if not any(isinstance(part, GradientCheckpointingLayer) for part in module.modules()):
            module.eval()
            module.train = types.MethodType(_ignore_train, module)  # type: ignore[method-assign]
            names.add(type(module).__name__)
    return sorted(names)


def _ignore_train(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _drawing(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose own code (not that of submodules) draws random numbers in training."""
    found: dict[nn.Module, None] = {}
    running: list[tuple[nn.Module, Tensor]] = []

    def state() -> Tensor:
        device = device_of(model)
        parts = [torch.get_rng_state()]
        if device.type == "cuda":
            parts.append(torch.cuda.get_rng_state(device))
        return torch.cat(parts)

    def look() -> Tensor:
        now = state()
        if running and not torch.equal(now, running[-1][1]):
            found[running[-1][0]] = None
        return now

    def enter(module: nn.Module, args: Any) -> None:
        running.append((module, look()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        now = look()
        running.pop()
        if running:
            running[-1] = (running[-1][0], now)

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        )
    ]
    try:
        _forward(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)
