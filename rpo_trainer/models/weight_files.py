"""The safetensors files of a model: which ones are read, and their headers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from rpo_trainer.errors import first_line

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def weight_files(folder: Path, config: Any = None) -> list[Path]:
    """Return the safetensors files of a directory that transformers reads.

    They are `model.safetensors`, or else the parts that `model.safetensors.index.json` names, or else none.

    Args:
        config: the model's, which can name another file (`transformers_weights`) and more of them.

    Raises:
        ValueError: the index is damaged.
    """
    named = getattr(config, "transformers_weights", None)
    choices = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    name = next((name for name in choices if (folder / name).is_file()), None)
    if name is None:
        return []
    names = {name}
    if name.endswith(".index.json"):
        try:
            names = set(
                json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name}: {first_line(error)}") from error
    names |= {
        more for more in getattr(type(config), "extra_files", ()) if (folder / more).is_file()
    }
    return [folder / str(each) for each in sorted(names, key=str)]


def has_weights(folder: Path) -> bool:
    """Whether a directory holds the weights of a full model, in safetensors or pickled."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any((folder / name).is_file() for name in names)


def tensors_in(files: Iterable[Path]) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of each tensor in safetensors files, from their headers."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                found[name] = (str(part.get_dtype()), list(part.get_shape()))
    return found


def stored_tensors(folder: Path, config: Any = None) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of each tensor of a directory's model (see `weight_files`)."""
    return tensors_in(weight_files(folder, config))


def stored_dtype(folder: Path, config: Any = None) -> torch.dtype | None:
    """Return the floating-point dtype of most weights in a directory's safetensors files, or None.

    Dtypes of less than 16 bits are those of quantized weights, and are not counted.
    """
    sizes: dict[torch.dtype, int] = {}
    for name, shape in stored_tensors(folder, config).values():
        if name in _DTYPES:
            sizes[_DTYPES[name]] = sizes.get(_DTYPES[name], 0) + math.prod(shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def local_folder(source: str | Path, revision: str | None = None) -> Path | None:
    """Return the directory of a model, or that of the hub's cache; None if neither exists."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(source), "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
