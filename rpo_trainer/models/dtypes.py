"""The dtype of weights in memory: frozen ones in that of the arithmetic, trained ones in float32."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.models.weight_files import stored_dtype

logger = logging.getLogger(__name__)

LOW = (torch.bfloat16, torch.float16)
ModelT = TypeVar("ModelT", bound=nn.Module)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in recipes and configurations: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def warn_of_rounding(
    folder: Path | None, dtype: torch.dtype, stage: str, *, held_in_float32: bool
) -> None:
    """Log a WARNING if a frozen base is rounded, or takes more memory than its dtype needs.

    Args:
        folder: of its files; None: not known.
        held_in_float32: whether an engine needs it in float32, see `round_weights`.
    """
    stored = None if folder is None else stored_dtype(folder)
    if stored is not None and stored.itemsize > dtype.itemsize:
        logger.warning(
            "%s: the frozen base weights, %s in their files, are rounded to %s; to keep them exact, set "
            "peft.frozen_dtype: float32",
            stage, dtype_name(stored), dtype_name(dtype),
        )  # fmt: skip
    if held_in_float32 and dtype != torch.float32:
        logger.warning(
            "%s: DeepSpeed requires one dtype for all weights: frozen base weights of %s are kept in float32",
            stage, dtype_name(dtype),
        )  # fmt: skip


def kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the weights that transformers always loads in float32, or None.

    These are the model class's `_keep_in_fp32_modules` (float16 only) and `_keep_in_fp32_modules_strict`.
    """
    inner = transformers_model(model)
    fields = ["_keep_in_fp32_modules_strict"]
    if dtype == torch.float16:
        fields.append("_keep_in_fp32_modules")
    names = {name for field in fields for name in getattr(inner, field, None) or ()}
    if not names or dtype == torch.float32:
        return None
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(names)))})(\.|$)")


def cast_weights(model: ModelT, dtype: torch.dtype) -> ModelT:
    """Cast all floating-point parameters in place, as loading in `dtype` would; buffers stay as they are.

    `model.to(dtype)` would round the rotary frequencies, which are buffers.
    """
    float32_names = kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (float32_names and float32_names.search(name)):
            parameter.data = parameter.data.to(dtype)
    return model


def round_weights(model: ModelT, dtype: torch.dtype) -> ModelT:
    """Round all weights to `dtype` and keep them in the dtype that they have, sharded by ZeRO-3 or not.

    For engines that need one dtype for frozen and trained weights (DeepSpeed).
    """
    float32_names = kept_in_float32(model, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local: Tensor = getattr(
                parameter, "ds_tensor", parameter.data
            )  # ZeRO-3: this rank's part
            if local.is_floating_point() and not (float32_names and float32_names.search(name)):
                local.copy_(local.to(dtype))
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that are not trained, as `cast_weights` does."""
    float32_names = kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and parameter.is_floating_point()
        if frozen and not (float32_names and float32_names.search(name)):
            parameter.data = parameter.data.to(dtype)


def adapter_in_float32(model: nn.Module) -> bool:
    """Cast what an adapter trains to float32 in place, including modules that it saves in full.

    PEFT does so for the matrices of an adapter, and leaves `modules_to_save` in the dtype of the base.
    Modules in float32 between others in a lower dtype cast their inputs, and their outputs back, as PEFT's
    layers do; so the model also runs without autocast. A head's output stays float32.

    Returns:
        Whether a weight had a lower dtype.
    """
    from peft.utils import ModulesToSaveWrapper

    inner = transformers_model(model)
    heads = (inner.get_output_embeddings(), getattr(inner, "score", None))
    changed = False
    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        for copied in wrapper.modules_to_save.values():
            low = next((p.dtype for p in copied.parameters() if p.dtype in LOW), None)
            if low is None:
                continue
            changed = _to_float32(copied.parameters())
            copied.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            if all(head is not wrapper for head in heads):
                copied.register_forward_hook(functools.partial(_cast_output, low))
    return _to_float32(p for p in model.parameters() if p.requires_grad) or changed


def _to_float32(parameters: Iterable[nn.Parameter]) -> bool:
    low = [parameter for parameter in parameters if parameter.dtype in LOW]
    for parameter in low:
        parameter.data = parameter.data.float()
    return bool(low)


def _cast_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    cast = functools.partial(_cast_floats, torch.float32)
    return tree_map(cast, args), tree_map(cast, kwargs)


def _cast_output(dtype: torch.dtype, _: nn.Module, __: Any, output: Any) -> Any:
    return tree_map(functools.partial(_cast_floats, dtype), output)


def _cast_floats(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
