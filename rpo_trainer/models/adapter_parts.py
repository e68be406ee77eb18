"""Modules that an adapter must train and save in full: new heads, and weights that are in no file."""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from rpo_trainer.errors import ModelError
from rpo_trainer.models.from_pretrained import loading_report
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.models.weight_files import local_folder, stored_tensors
from rpo_trainer.runtime.distributed import is_main

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


def with_new_parts(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """Add the modules that the adapter must train and save in full to its config; a copy if it changes.

    These are the head of a classifier, which PEFT includes only for task type SEQ_CLS, and modules that are
    missing from the model's files.
    """
    heads = _heads(model) if is_classifier(model) else []
    missing, resized = fresh_parameters(transformers_model(model))
    modules = {name.rpartition(".")[0] for name in missing}
    parts = [*heads, *sorted(m for m in modules if m not in heads)]
    _warn_resized(resized, config)
    if not parts:
        return config
    if not hasattr(config, "modules_to_save"):
        raise ModelError(
            f"the adapter method {config.peft_type} cannot also train {', '.join(parts)}",
            code="adapter.cannot-save-parts",
            why="these modules are newly initialized, and would stay random if they were frozen",
            fix="use LoRA",
        )
    task_type = getattr(config.task_type, "value", config.task_type)
    modules_to_save = list(config.modules_to_save or ())
    changed: Any = copy.deepcopy(config)
    changed.modules_to_save = modules_to_save + [
        part for part in parts if part.split(".")[-1] not in modules_to_save
    ]
    if heads:
        changed.task_type = "SEQ_CLS"
    if (task_type != changed.task_type or changed.modules_to_save != modules_to_save) and is_main():
        logger.warning(
            "the adapter trains and saves %s in full (modules_to_save)%s",
            ", ".join(parts),
            f"; its task_type is SEQ_CLS, not {task_type}"
            if heads and task_type != "SEQ_CLS"
            else "",
        )
    return changed  # type: ignore[no-any-return]


def _heads(classifier: Any) -> list[str]:
    """Return the names of a classifier's modules other than its decoder."""
    return [
        name
        for name, part in classifier.named_children()
        if part is not classifier.base_model and any(True for _ in part.parameters())
    ]


def fresh_parameters(inner: Any) -> tuple[list[str], list[str]]:
    """Return parameters that are missing from a model's files, and those of another shape.

    Both are empty for models that are neither from a directory nor in the hub's cache.
    """
    created = list(getattr(inner, "_rpo_made", ()))  # by this package
    if getattr(inner, "_rpo_complete", False):  # loaded by this package, with all of its weights
        return created, []
    name = getattr(inner, "name_or_path", "") or ""
    folder = local_folder(name) if name else None
    quantized = getattr(inner.config, "quantization_config", None) is not None
    try:
        if folder is None or quantized or not stored_tensors(folder, inner.config):
            return created, []
        model, info = loading_report(type(inner), inner.config, folder, name)
    except (ModelError, OSError, ValueError, SafetensorError):
        return created, []
    if model is None:
        return created, []
    missing = sorted({*info["missing_keys"], *created})
    return missing, sorted(key[0] for key in info["mismatched_keys"])


def warn_of_random(model: nn.Module) -> None:
    """Log a WARNING if a model that the caller has loaded has weights that are missing from its files."""
    inner = transformers_model(model)
    heads = _heads(inner) if is_classifier(inner) else []
    missing = [n for n in fresh_parameters(inner)[0] if n.split(".")[0] not in heads]
    if missing and is_main():
        logger.warning(
            "%d weights are missing from the files of the model (%s): they start at random",
            len(missing), ", ".join(missing[:4]),
        )  # fmt: skip


def _warn_resized(resized: list[str], config: Any) -> None:
    names = {*(getattr(config, "modules_to_save", None) or ()), *_targets(config)}
    frozen = [name for name in resized if not names & {*name.split(".")}]
    if frozen and not getattr(config, "trainable_token_indices", None) and is_main():
        logger.warning(
            "%s were resized after loading: the adapter does not train their new rows. To train them, "
            "set trainable_token_indices to the new tokens, or add the modules to modules_to_save",
            ", ".join(frozen),
        )


def warn_of_fused_experts(wrapped: Any, config: Any) -> None:
    """Log a WARNING if an adapter does not train experts whose weights are not linear layers.

    PEFT's `target_modules` names modules; families that hold all experts of a layer in one parameter need
    `target_parameters`.

    Args:
        wrapped: a model that PEFT has wrapped with a fresh adapter.
        config: the adapter's.
    """
    if not hasattr(config, "target_parameters"):
        return
    trained = set(getattr(wrapped.base_model, "targeted_parameter_names", ()))
    untrained: dict[str, int] = {}
    for path, module in transformers_model(wrapped).named_modules():
        path = re.sub(r"(\.base_layer)+(?=\.|$)", "", path)
        for name, p in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}"
            if (
                _is_fused_experts(path, name, module, p)
                and full_name not in trained
                and not p.requires_grad
            ):
                short = re.split(r"\.\d+\.", full_name)[-1]
                untrained[short] = untrained.get(short, 0) + p.numel()
    if untrained and is_main():
        logger.warning(
            "the adapter does not train the experts: %s (%.3g weights) are parameters, and "
            "target_modules covers only linear layers. To train them, set target_parameters: [%s]",
            ", ".join(untrained), sum(untrained.values()), ", ".join(untrained),
        )  # fmt: skip


def _is_fused_experts(path: str, name: str, module: nn.Module, p: nn.Parameter) -> bool:
    """Whether a parameter holds the weights of all experts of a layer."""
    if (
        p.ndim < 2
        or name.endswith("bias")
        or type(module).__module__.startswith(("torch.", "peft."))
    ):
        return False
    return "expert" in f"{path}.{type(module).__name__}".lower()


def _targets(config: Any) -> set[str]:
    targets = getattr(config, "target_modules", None)
    return set() if targets is None or isinstance(targets, str) else set(targets)


def require_trained_parts(model: nn.Module) -> None:
    """Raise ModelError if an adapter of the caller leaves random modules frozen.

    A frozen classifier head, which may have been trained before, is a WARNING.
    """
    inner = transformers_model(model)
    trained = {_plain_name(name) for name, p in inner.named_parameters() if p.requires_grad}
    missing, resized = fresh_parameters(inner)
    frozen = [name for name in missing if name not in trained]
    if frozen:
        raise ModelError(
            f"{', '.join(frozen[:4])} are newly initialized, and the adapter neither trains nor saves them",
            code="adapter.frozen-random-parts",
            why="the model's files do not contain them",
            fix='name their modules in modules_to_save of the adapter\'s config (task_type="SEQ_CLS" '
            "includes the head of a reward model), or pass the model and peft_config",
        )
    for config in model.peft_config.values():  # type: ignore[operator]
        _warn_resized([name for name in resized if name not in trained], config)
    if not is_classifier(model):
        return
    heads = [name for name in _heads(inner) if not _trains(inner, name)]
    if heads and is_main():
        logger.warning(
            "the adapter leaves the head of the reward model (%s) frozen and does not save it: this is "
            "correct only if the head is already trained and saved with the base",
            ", ".join(heads),
        )


def _trains(inner: nn.Module, part: str) -> bool:
    return any(p.requires_grad for p in inner.get_submodule(part).parameters())


def _plain_name(name: str) -> str:
    """Return a parameter's name without the prefix of `modules_to_save`."""
    before, mark, after = name.partition(".modules_to_save.")
    return before + "." + after.partition(".")[2] if mark else name
