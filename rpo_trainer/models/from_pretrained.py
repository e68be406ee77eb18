"""The only module that calls `from_pretrained` of models and tokenizers.

Weights are read from safetensors, and code from a repository runs only if the caller allows it. Models must
be complete: transformers fills missing tensors with random numbers and only logs it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from rpo_trainer.errors import ModelError, last_line
from rpo_trainer.models.multimodal import CLASSIFIER, is_multimodal, require_text_forward
from rpo_trainer.models.saved_files import (
    PROCESSOR_FILES,
    processor_files,
    processor_template,
    read_generation,
    remember_processor,
)
from rpo_trainer.models.sharding import is_replicated, loading_unsharded
from rpo_trainer.models.weight_files import has_weights, local_folder, stored_tensors
from rpo_trainer.runtime.distributed import is_main

logger = logging.getLogger(__name__)

# Not RuntimeError: that may be the device, or memory.
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)
ADAPTER_CONFIG = "adapter_config.json"
_SHOWN = 4  # tensors that an error names
_INTEGERS = "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"  # dtypes of safetensors
_TENSORS = re.compile(
    r"loading state_dict|size mismatch|ignore_mismatched_sizes|conversion of the weights"
)
_HEAD = re.compile(r"^lm_head\.")


def load_pretrained(
    factory: Any, source: str | Path, *, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """Load a tokenizer or a configuration without the prompt on stdin about remote code.


    A tokenizer without a chat template gets that of its processor's `chat_template.json`.
    """
    loaded = factory.from_pretrained(source, trust_remote_code=trust_remote_code, **settings)
    if factory is AutoTokenizer and not loaded.chat_template:
        loaded.chat_template = processor_template(
            source,
            revision=settings.get("revision"),
            local_files_only=bool(settings.get("local_files_only")),
        )
    return loaded


def load_complete(
    factory: Any, source: str | Path, *, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """Load a model with all of its weights from safetensors.

    Args:
        factory: one of transformers' Auto classes for models.
        source: directory or hub name.
        settings: further arguments of `from_pretrained`.

    Raises:
        ModelError: missing, unexpected or mismatched tensors; an adapter next to the model; a damaged
            generation config.
        OSError, ValueError, ...: see `LOADING_ERRORS`.
    """
    where = str(source)
    refuse_adapter(where)
    try:
        model, info = factory.from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **settings,
        )
    except RuntimeError as error:
        if _TENSORS.search(str(error)) is None:
            raise
        raise _other_tensors(error, where) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter_in_directory(where, with_model=False)
    _keep_used_conversions(model)
    folder = local_folder(source, settings.get("revision"))
    _require_complete(
        model, info, where, lambda: {} if folder is None else stored_tensors(folder, model.config)
    )
    if folder is not None and model.can_generate():
        read_generation(folder, where)
    if is_multimodal(model.config):
        _complete_multimodal(model, source, settings, where)
    return model


def _keep_used_conversions(model: Any) -> None:
    """Keep only the tensor-name conversions that loading has used.

    Saving reverts them. transformers drops unused ones itself, except under DeepSpeed ZeRO-3.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and all(hasattr(conversion, "was_used") for conversion in conversions):
        model._weight_conversions = [c for c in conversions if c.was_used()]


def _complete_multimodal(
    model: Any, source: str | Path, settings: Mapping[str, Any], where: str
) -> None:
    if settings.get("quantization_config") is None and is_replicated(model):
        require_text_forward(model, where)
    files = processor_files(
        source,
        revision=settings.get("revision"),
        local_files_only=bool(settings.get("local_files_only")),
    )
    if not files and not Path(source).is_dir() and is_main():
        logger.warning(
            "%s: no processor files were found (%s); the output lacks them, but requires them to "
            "accept images or sound",
            where, ", ".join(PROCESSOR_FILES),
        )  # fmt: skip
    remember_processor(model, files)


_FIX = (
    "copy or download the model's files again; or load them with transformers, check its report, and "
    "save the model to train with `save_pretrained`"
)


def refuse_adapter(where: str) -> None:
    """Raise ModelError if a directory holds a PEFT adapter, alone or next to a model."""
    folder = Path(where)
    if (folder / ADAPTER_CONFIG).is_file():
        raise _adapter_in_directory(where, with_model=has_weights(folder))


def _adapter_in_directory(where: str, *, with_model: bool) -> ModelError:
    return ModelError(
        f"this directory holds a PEFT adapter{' next to a model' if with_model else ', not a full model'}",
        code="model.adapter-in-directory",
        where=where,
        why="it is not clear whether to merge it, to train it further or to ignore it",
        fix="move the adapter to a separate directory"
        if with_model
        else "load its base, then PeftModel.from_pretrained(base, directory, is_trainable=True), and pass "
        "the wrapped model; in a recipe, name the adapter's directory as `init` of a stage",
    )


def _require_complete(
    model: Any,
    info: Mapping[str, Collection[Any]],
    where: str,
    headers: Callable[[], dict[str, tuple[str, list[int]]]],
) -> None:
    """Raise ModelError if transformers' loading report is not empty."""
    differences = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    more = _left_over(model, info["unexpected_keys"], headers)
    by_kind = {**differences, "unknown": more}
    if not any(by_kind.values()):
        return
    parts = [f"{what}: {_named(names)}" for what, names in by_kind.items() if names]
    raise ModelError(
        f"the model's files do not match a {type(model).__name__}: {'; '.join(parts)}",
        code="model.tensor-mismatch",
        details={
            "missing": differences["missing"],
            "other_shape": differences["of another shape"],
            "unknown": more,
        },
        where=where,
        why="transformers would initialize missing tensors at random and ignore the others"
        if any(differences.values())
        else "the files hold more than this model, such as other parts of a composite model, which would "
        "be ignored and not saved",
        fix=_FIX,
    )


def _named(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _left_over(
    model: Any,
    unexpected: Collection[str],
    headers: Callable[[], dict[str, tuple[str, list[int]]]],
) -> list[str]:
    """Return tensors that hold weights the model has no parameter for.

    Masks, constants and computed buffers, which old releases saved, do not count.
    """
    if not unexpected:
        return []
    known = headers()
    classifier = type(model).__name__.endswith(CLASSIFIER)
    saved, prefix = model.state_dict(), model.base_model_prefix + "."
    computed = {name for name, _ in model.named_buffers() if name not in saved}
    return sorted(
        name
        for name in unexpected
        # A classifier does not use a language head.
        if not (classifier and _HEAD.match(name))
        and not (name in known and (known[name][0] in _INTEGERS or not known[name][1]))
        and not computed & {name, prefix + name, name.removeprefix(prefix)}
    )


# --- without reading the weights ---


def check_stored(
    factory: Any, config: Any, folder: Path, where: str, *, trust_remote_code: bool = False
) -> None:
    """Raise ModelError if `load_complete` would, from the headers of the files alone.

    transformers loads tensors of these names and shapes without values, so that its renamings, ties and
    exceptions apply. Quantized files are checked when they are loaded.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    model, info = loading_report(
        factory, config, folder, where, trust_remote_code=trust_remote_code
    )
    if model is not None:
        _require_complete(model, info, where, lambda: stored_tensors(folder, config))


def loading_report(
    factory: Any, config: Any, folder: Path, where: str, *, trust_remote_code: bool = False
) -> tuple[Any, Mapping[str, Collection[Any]]]:
    """Return a model without values and its loading report; None if no model can be created.

    Args:
        factory: an Auto class, or the model's own class.
    """
    stored = {
        name: torch.empty(shape, device="meta")
        for name, (_, shape) in stored_tensors(folder, config).items()
    }
    try:
        with loading_unsharded(), quiet_loading():
            kind = factory
            if not hasattr(factory, "config_class"):
                with torch.device("meta"):
                    kind = type(factory.from_config(config, trust_remote_code=trust_remote_code))
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=stored,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            )
    except RuntimeError as error:
        if _TENSORS.search(str(error)) is None:
            raise
        raise _other_tensors(error, where) from error
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError, ImportError):
        return None, {}  # reported where the model is created
    return model, info


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' loading report and progress bar."""
    from transformers.utils import logging as theirs

    log = logging.getLogger("transformers")
    level, bar = log.level, theirs.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        log.setLevel(level)
        if bar:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


def _other_tensors(error: RuntimeError, where: str) -> ModelError:
    return ModelError(
        "the model cannot be loaded: its files do not match its class",
        code="model.tensor-mismatch",
        where=where,
        why=last_line(error),
        fix=_FIX,
    )
