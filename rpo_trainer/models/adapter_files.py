"""PEFT adapters on disk: their base model, and whether their files are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rpo_trainer.errors import ModelError, RecipeError, first_line
from rpo_trainer.models.from_pretrained import ADAPTER_CONFIG
from rpo_trainer.models.sharding import has_shards
from rpo_trainer.models.weight_files import has_weights, tensors_in
from rpo_trainer.runtime.file_errors import reads

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
BASE = "adapter_base.json"  # path of the base relative to the adapter, so that a run can be moved


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no full model; the base's config may be next to it."""
    return (folder / CONFIG).is_file() and not has_weights(folder)


def write_base(
    folder: Path, base: str, *, relative: str | None = None, plain_start: bool = False
) -> None:
    """Write the base model into a saved adapter.

    Args:
        base: absolute directory or hub name, for PEFT and other tools.
        relative: the directory relative to the adapter's, which is tried first: both may have been moved.
        plain_start: the saved base already includes the changes of the adapter's initialization.
    """
    path = folder / CONFIG
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = base
    if relative is not None:
        (folder / BASE).write_text(json.dumps({"base": relative}))
    if plain_start:
        settings["init_lora_weights"] = True
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))
    (folder / "README.md").unlink(missing_ok=True)  # peft's, an empty form


@reads("the adapter", str)
def base_of(folder: Path) -> str:
    """Return the directory or hub name of a saved adapter's base model.

    Raises:
        ModelError: the adapter does not name it.
    """
    if (folder / BASE).is_file():
        near = folder / str(json.loads((folder / BASE).read_text())["base"])
        if near.is_dir():
            return str(near.resolve())
    name = json.loads((folder / CONFIG).read_text()).get("base_model_name_or_path")
    if not name:
        raise ModelError(
            "the adapter does not name its base model",
            code="adapter.no-base",
            where=str(folder / CONFIG),
            why="an adapter works only with the base model that it was trained on",
            fix="set base_model_name_or_path to the model's directory or hub name",
        )
    for local in (folder / Path(name).expanduser(), Path(name).expanduser()):
        if local.is_dir():
            return str(local.resolve())
    return str(name)


def make_base_absolute(folder: Path) -> None:
    """Make the base's path absolute, since PEFT saves a relative one as it was given."""
    path = folder / CONFIG
    if not path.is_file():
        return
    settings = json.loads(path.read_text())
    name = settings.get("base_model_name_or_path")
    if name and not os.path.isabs(name) and Path(name).is_dir():
        settings["base_model_name_or_path"] = os.path.abspath(name)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))


def require_weights(folder: Path, where: str) -> None:
    """Raise ModelError if a directory has no adapter weights in safetensors."""
    if (folder / WEIGHTS).is_file():
        try:
            tensors_in([folder / WEIGHTS])
            return
        except (OSError, SafetensorError) as error:
            what = f"{WEIGHTS} is damaged ({first_line(error)})"
    else:
        pickled = (folder / "adapter_model.bin").is_file()
        what = "its weights are pickled (adapter_model.bin)" if pickled else f"{WEIGHTS} is missing"
    raise ModelError(
        f"the adapter cannot be loaded: {what}",
        code="adapter.unusable-weights",
        where=where,
        why="weights are read only from safetensors, because a pickle can contain code",
        fix="copy the adapter again; or, if you trust its origin, load it with PEFT and `save_pretrained`",
    )


def require_complete(model: Any, folder: Path) -> None:
    """Raise ModelError if the adapter's file has missing or unexpected tensors; PEFT only warns."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    found, known = _as_loaded(model, tensors_in([folder / WEIGHTS])), model.state_dict()
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys() - known.keys())
    other = [
        name
        for name, tensor in sorted(expected.items())
        if name in found and not has_shards(model) and found[name] != list(tensor.shape)
    ]
    if not missing and not unknown and not other:
        return
    parts = [
        f"{what}: {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for what, names in (("missing", missing), ("of another shape", other), ("unknown", unknown))
        if names
    ]
    raise ModelError(
        f"the adapter's file does not match its configuration and base; {'; '.join(parts)}",
        code="adapter.tensor-mismatch",
        details={"missing": missing, "other_shape": other, "unknown": unknown},
        where=str(folder / WEIGHTS),
        why="PEFT would initialize missing tensors and ignore the others",
        fix="copy the adapter again, or set the base that it was trained on",
    )


def _as_loaded(model: Any, stored: Mapping[str, tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Return the shapes of an adapter's tensors under the names that PEFT uses when loading.

    Adapters of mixtures of experts created with transformers 4 have one pair for each expert.
    """
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers as convert,
    )

    config = model.peft_config[model.active_adapter]
    empty = {name: torch.empty(shape, device="meta") for name, (_, shape) in stored.items()}
    return {
        name: list(tensor.shape)
        for name, tensor in convert(model, config, empty, model.active_adapter).items()
    }


@reads("the adapter", lambda folder, wanted: str(folder))
def require_same_config(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise RecipeError if a saved adapter differs from a recipe's `peft`."""
    saved = json.loads((folder / CONFIG).read_text())
    for name, value in wanted.items():
        if name == "init_lora_weights" or name not in saved or value == "all-linear":
            continue  # already initialized; PEFT replaces `all-linear` by names
        old, new = saved[name], value
        if isinstance(old, list) and isinstance(new, list):
            old, new = sorted(old, key=str), sorted(new, key=str)
        if old != new:
            raise RecipeError(
                f"the recipe continues this adapter, whose {name} is {saved[name]}, not {value}",
                code="adapter.config-mismatch",
                where=str(folder),
                why="its weights were trained with these settings",
                fix=f"set {name}: {saved[name]}, or merge the adapter first",
            )
