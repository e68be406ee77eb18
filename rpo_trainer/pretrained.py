"""The only module that calls `from_pretrained` of models and tokenizers.

Weights come from safetensors, code from a repository runs only where the caller allows it, and a model is
complete: transformers fills tensors that are missing from the files with random numbers and only logs it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rpo_trainer.errors import ModelError
from rpo_trainer.sharding import loading_whole

LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
ADAPTER_CONFIG = "adapter_config.json"
_SHOWN = 4  # tensors that an error names
_INTEGERS = "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"  # dtypes of safetensors
_HEAD = re.compile(r"^lm_head\.")


def load_pretrained(
    factory: Any, source: str | Path, *, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """A tokenizer or a configuration; transformers would ask on stdin whether to run a repository's code."""
    return factory.from_pretrained(source, trust_remote_code=trust_remote_code, **settings)


def load_complete(
    factory: Any, source: str | Path, *, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """A model with all of its weights, each of them from safetensors.

    Args:
        factory: one of transformers' Auto classes for models.
        source: directory or hub name.
        settings: further arguments of `from_pretrained`.

    Raises:
        ModelError: tensors that are missing, left over or of another shape; an adapter beside the model.
        OSError, ValueError, ...: see `LOADING_ERRORS`.
    """
    where = str(source)
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise _adapter_there(where)
    try:
        model, info = factory.from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **settings,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _other_tensors(error, where) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter_there(where)
    _require_complete(type(model), info, where, lambda: _headers_of(source, settings))
    return model


_FIX = (
    "copy or download the model's files again; or load them with transformers, read its report, and "
    "`save_pretrained` what you want to train"
)


def _adapter_there(where: str) -> ModelError:
    return ModelError(
        "this directory holds a PEFT adapter, not only a model",
        where=where,
        why="transformers would load both as one model, whose adapter is neither trained nor merged",
        fix="name the base model here; load an adapter with PeftModel.from_pretrained(base, directory, "
        "is_trainable=True) and pass the wrapped model, or name the adapter's directory as `init` of a "
        "recipe's stage",
    )


def _require_complete(
    kind: type, info: Mapping[str, Collection[Any]], where: str, headers: Any
) -> None:
    """Raises ModelError where transformers' loading report is not empty."""
    found = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
        "unknown": _left_over(kind, info["unexpected_keys"], headers),
    }
    if not any(found.values()):
        return
    parts = [f"{what}: {_named(names)}" for what, names in found.items() if names]
    raise ModelError(
        f"the files of the model do not fit a {kind.__name__}: {'; '.join(parts)}",
        where=where,
        why="transformers would fill what is missing with random numbers and leave out the rest",
        fix=_FIX,
    )


def _named(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _left_over(kind: type, unexpected: Collection[str], headers: Any) -> list[str]:
    """Tensors that hold weights the class has no place for; masks and constants of old releases do not."""
    if not unexpected:
        return []
    known: dict[str, tuple[str, list[int]]] = headers()
    classifier = kind.__name__.endswith("ForSequenceClassification")
    return sorted(
        name
        for name in unexpected
        if not (
            classifier and _HEAD.match(name)
        )  # a language head, which a classifier does not use
        and not (name in known and (known[name][0] in _INTEGERS or not known[name][1]))
    )


# --- without reading the weights ---


def stored_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of each tensor in a directory's safetensors files, from their headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                found[name] = (str(part.get_dtype()), list(part.get_shape()))
    return found


def _headers_of(source: str | Path, settings: Mapping[str, Any]) -> Any:
    folder = local_folder(source, settings.get("revision"))
    return {} if folder is None else stored_tensors(folder)


def local_folder(source: str | Path, revision: str | None = None) -> Path | None:
    """The directory that a model is in, or the one in the hub's cache; None: neither is there."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(source), "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_stored(
    factory: Any, config: Any, folder: Path, where: str, *, trust_remote_code: bool = False
) -> None:
    """Raises ModelError where `load_complete` would, from the headers of the files alone.

    transformers loads tensors of these names and shapes without values, so that its renamings, ties and
    exceptions count. Weights that are quantized in the files are left to the loading itself.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    kind, info = loading_report(factory, config, folder, where, trust_remote_code=trust_remote_code)
    if kind is not None:
        _require_complete(kind, info, where, lambda: stored_tensors(folder))


def loading_report(
    factory: Any, config: Any, folder: Path, where: str, *, trust_remote_code: bool = False
) -> tuple[type | None, Mapping[str, Collection[Any]]]:
    """Class and loading report of a model whose weights are not read; class None: it cannot be told.

    Args:
        factory: an Auto class, or the model's own class.
    """
    stored = {
        name: torch.empty(shape, device="meta")
        for name, (_, shape) in stored_tensors(folder).items()
    }
    try:
        with loading_whole(), quiet_loading():
            kind = factory
            if not hasattr(factory, "config_class"):
                with torch.device("meta"):
                    kind = type(factory.from_config(config, trust_remote_code=trust_remote_code))
            _, info = kind.from_pretrained(
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
        raise _other_tensors(error, where) from error
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError, ImportError):
        return None, {}  # no model can be made of the configuration: said where one is made
    return kind, info


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers' loading report and progress bar from the screen."""
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
        "the model cannot be loaded: its files do not hold the tensors of its class",
        where=where,
        why=_last_line(error),
        fix=_FIX,
    )


def _last_line(error: Exception) -> str:
    return [type(error).__name__, *str(error).strip().splitlines()][-1].strip()
