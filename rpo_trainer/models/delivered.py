"""A model directory copied in another dtype: the output of a stage, next to the exact float32 weights."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rpo_trainer.models.dtypes import dtype_name
from rpo_trainer.models.weight_files import tensors_in, weight_files

logger = logging.getLogger(__name__)

_CONFIG = "config.json"


def config_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype in a model's configuration, or in that of its text part; None if neither has one."""
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
            return dtype
    return None


def copy_in_dtype(
    source: Path, target: Path, dtype: torch.dtype, float32_names: re.Pattern[str] | None = None
) -> bool:
    """Copy a model directory with its float32 weights cast to `dtype`, one file in memory at a time.

    Args:
        source: a full model in safetensors, as `save_pretrained` writes it.
        target: replaced if it exists.
        float32_names: names of weights that stay float32, see `kept_in_float32`.

    Returns:
        False if a weight is too large for `dtype` (float16 ends at 65504); `target` is then removed.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = set(weight_files(source))
    for path in sorted(source.iterdir()):
        if path in weights:
            large = _cast_file(path, target / path.name, dtype, float32_names)
            if large is not None:
                logger.warning(
                    "%s is too large for %s: the output is saved in float32",
                    large, dtype_name(dtype),
                )  # fmt: skip
                shutil.rmtree(target)
                return False
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)
    _name_dtype(target / _CONFIG, dtype)
    index = target / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = _size(target)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return True


def _cast_file(
    path: Path, target: Path, dtype: torch.dtype, float32_names: re.Pattern[str] | None
) -> str | None:
    """Cast one file; return the name of a weight that does not fit, or None."""
    tensors: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_tensor(name)
            if tensor.dtype == torch.float32 and not (float32_names and float32_names.search(name)):
                cast = tensor.to(dtype)
                if dtype == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
                    return str(name)
                tensor = cast
            tensors[name] = tensor
    save_file(tensors, target, metadata=metadata)
    return None


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype into config.json, at each level that names one, so that Auto classes load it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for part in parts:
        for field in ("dtype", "torch_dtype"):
            if field in part:
                part[field] = dtype_name(dtype)
    content["dtype"] = dtype_name(dtype)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _size(folder: Path) -> int:
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    return sum(
        widths.get(dtype, 1) * torch.Size(shape).numel()
        for dtype, shape in tensors_in(weight_files(folder)).values()
    )
