"""Sharded weights: FSDP2, ZeRO-3, or loaded by the first rank only and not yet distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.fsdp import is_fsdp_enabled

from rpo_trainer.runtime import distributed


def is_replicated(model: nn.Module) -> bool:
    """Return False if weights are sharded, or on one rank only until the model is wrapped."""
    if is_fsdp_enabled():  # despite its name: whether memory-saving loading is on
        return False
    return not has_shards(model) and not any(p.is_meta for p in model.parameters())


def has_shards(model: nn.Module) -> bool:
    """Whether each rank holds a shard of the weights."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered after a forward for the backward."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model computes on; sharded weights may be stored elsewhere."""
    return distributed.device() if has_shards(model) else next(model.parameters()).device


def num_rows(weight: Any) -> int:
    """Return the number of rows of a matrix, also if it is sharded."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def gathered(tensor: Any) -> Iterator[Tensor]:
    """Gather a parameter; all ranks must call it."""
    if hasattr(tensor, "full_tensor"):
        yield tensor.detach().full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    else:
        yield tensor.detach()


@contextmanager
def loading_unsharded() -> Iterator[None]:
    """Load models inside with all weights on every rank, regardless of the engine."""
    from transformers.integrations import deepspeed as integration

    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    saved, config = os.environ.pop(name, None), integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config
        if saved is not None:
            os.environ[name] = saved


def full_state_dict(
    model: nn.Module, *, keep: bool, trained_only: bool = False
) -> dict[str, Tensor]:
    """Gather all weights in float32 on the CPU, one at a time; all ranks must call it.

    Args:
        keep: False takes part in the gathering and returns nothing.
        trained_only: leave out frozen weights and buffers, except the base weights that PEFT saves next to an
            adapter of the embeddings or the head.
    """
    found: dict[str, Tensor] = {}
    below = _below_adapters(model)
    known: dict[int, Tensor] = {}  # tied weights are gathered once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not (tensor.requires_grad or name.startswith(below)):
            continue
        if id(tensor) not in known:
            full = _full_precision(tensor)
            full = full.float() if full.is_floating_point() else full
            known[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            found[name] = known[id(tensor)]
    return found


def _below_adapters(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the base weights below an adapter of the embeddings or the head."""
    ends = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    layers = [getattr(end(), "base_layer", None) for end in ends if end is not None]
    return tuple(
        f"{name}." for name, part in model.named_modules() if any(part is one for one in layers)
    )


def _full_precision(tensor: Any) -> Tensor:
    """Return the optimizer's copy of a weight; DeepSpeed's module has one in the dtype of the arithmetic."""
    if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(tensor)
        if full is not None:
            return full  # type: ignore[no-any-return]
    with gathered(tensor) as full:
        return full.clone()
