"""Checkpoints with vision or audio towers, trained on text: their class, their decoder, their towers.

The class is the checkpoint's own conditional one, so that what is written can be read again as it was. Its
text decoder, embeddings and head are trained; the towers and projectors take no part in a forward of text and
are frozen.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

from rpo_trainer.errors import ModelError, first_line

if TYPE_CHECKING:
    from peft import PeftConfig

# Not the processor's old chat_template.json: it would hide the template that the tokenizer writes.
PROCESSOR_FILES = (
    PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME
)  # fmt: skip
_OWN_CODE = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
_FIX = "take a causal language model, or a multimodal one whose forward takes text alone"


# --- which class ---


class OneClass:
    """A class of transformers that no Auto class maps its configuration to, used as an Auto class is.

    Attributes:
        kind: the model class.
    """

    def __init__(self, kind: type[PreTrainedModel]) -> None:
        self.kind = kind

    def from_config(self, config: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
        """A model of random weights; `trust_remote_code` has no meaning for a class that is known."""
        model: Any = self.kind(copy.deepcopy(config))
        return model if dtype is None else model.to(dtype)

    def from_pretrained(self, source: Any, **settings: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`."""
        return self.kind.from_pretrained(source, **settings)


def is_composite(config: Any) -> bool:
    """Whether a configuration has a text part beside others."""
    return config.get_text_config() is not config


def language_model_class(config: Any, where: str) -> Any:
    """What loads the language model of a configuration: an Auto class, or one like it.

    `architectures` decides; without a class that transformers knows, a composite configuration means the
    conditional class and any other one the causal class.

    Raises:
        ModelError: transformers has no language model for the configuration, or one that text alone does
            not suffice for.
    """
    code = getattr(config, "auto_map", None) or {}
    if (own := next((name for name in _OWN_CODE if name in code), None)) is not None:
        return getattr(transformers, own)  # which asks for `trust_remote_code`
    known = {
        factory: kind
        for factory, mapping in (
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
        )
        if (kind := mapping.get(type(config), None)) is not None
    }
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    chosen = next((f for f, kind in known.items() if kind.__name__ in named), None)
    if chosen is None and known:
        chosen = list(known)[-1 if is_composite(config) else 0]
    if chosen is not None:
        _require_text(known[chosen], config, where)
        return chosen
    for kind in (getattr(transformers, name, None) for name in named):
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            _require_text(kind, config, where)
            return OneClass(kind)
    raise ModelError(
        f"transformers has no language model for the configuration of {_a(config)}",
        where=where,
        why="neither AutoModelForCausalLM nor AutoModelForMultimodalLM has a class for it"
        + (f", and its architectures ({', '.join(named)}) name none" if named else ""),
        fix=_FIX,
    )


def _a(config: Any) -> str:
    return f"a {getattr(config, 'model_type', None) or type(config).__name__} model"


def _require_text(kind: Any, config: Any, where: str) -> None:
    """Raises ModelError where a class cannot compute log-probs of text alone, by its signature."""
    if getattr(config, "is_encoder_decoder", False) and is_composite(config):
        why = "it is an encoder-decoder: its decoder reads what the encoder makes of an image"
    elif not inspect.isfunction(kind.forward) or kind.forward.__name__ != "forward":
        why = "it has no forward; it generates only, from several models"
    elif needed := _required_arguments(kind.forward):
        why = f"its forward requires {', '.join(needed)}"
    else:
        return
    raise _not_on_text(kind.__name__, why, where)


def _required_arguments(forward: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in list(inspect.signature(forward).parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name != "input_ids"
    ]


def _not_on_text(name: str, why: str, where: str | None) -> ModelError:
    return ModelError(
        f"a {name} cannot be trained on text alone", where=where, why=why, fix=_FIX
    )


def require_text_forward(model: Any, where: str | None = None) -> None:
    """Raises ModelError where a composite model refuses a few tokens without an image or sound.

    Weights may be on the meta device; a forward that needs their values is then no answer.
    """
    if not is_composite(model.config) and type(model.config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return
    if head_of_text(model) is None:
        raise _not_on_text(name, "it has no language head", where)
    device = next(model.parameters()).device
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise _not_on_text(name, f"its forward says: {first_line(error)}", where) from error
    except (RuntimeError, IndexError):
        if device.type != "meta":
            raise
    finally:
        model.train(training)


# --- the parts ---


def text_decoder(model: Any) -> Any:
    """The module that makes hidden states of tokens: `[B, T]` → `last_hidden_state [B, T, H]`.

    `get_decoder` of some conditional classes is a language model with its head; its decoder is inside.
    """
    decoder = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inside = decoder.get_decoder()
        if inside is decoder:
            embeddings = decoder.get_input_embeddings()
            inside = next(
                (
                    child
                    for child in decoder.children()
                    if isinstance(child, PreTrainedModel)
                    and any(part is embeddings for part in child.modules())
                ),
                decoder,
            )
        if inside is decoder:
            break
        decoder = inside
    return decoder


def head_of_text(model: Any) -> Any:
    """The layer that makes logits of hidden states; None: there is none."""
    return model.get_output_embeddings()


def towers(model: Any) -> dict[str, nn.Module]:
    """Modules of a transformers model, by name, that a forward of text does not use: the largest of each.

    Of a model without other modalities there are none.
    """
    config = model.config
    if not (is_composite(config) or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING):
        return dict(_cross_attention(model, text_decoder(model)))
    kept = [text_decoder(model), model.get_input_embeddings()]
    kept += [part for name in ("score", "lm_head") if (part := getattr(model, name, None))]
    kept.append(head_of_text(model))
    found = dict(_outside(model, [part for part in kept if part is not None]))
    if not is_composite(config):  # its decoder holds the towers
        found |= dict(_of_other_configs(model, kept[0]))
    found |= dict(_cross_attention(model, kept[0]))
    return {name: part for name, part in found.items() if any(True for _ in part.parameters())}


def _outside(model: nn.Module, kept: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that hold none of `kept` and are not inside one."""
    whole = {id(part) for one in kept for part in one.modules()}
    holders = {
        id(part) for part in model.modules() if any(id(one) in whole for one in part.modules())
    }

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if id(child) not in holders:
                yield prefix + name, child
            elif id(child) not in whole:
                yield from walk(f"{prefix}{name}.", child)

    yield from walk("", model)


def _of_other_configs(model: nn.Module, decoder: Any) -> Iterator[tuple[str, nn.Module]]:
    """Children of the decoder with a model of another configuration inside."""
    for name, child in decoder.named_children():
        if any(
            isinstance(part, PreTrainedModel) and type(part.config) is not type(decoder.config)
            for part in child.modules()
        ):
            yield f"{_prefix(model, decoder)}{name}", child


def _cross_attention(model: Any, decoder: Any) -> Iterator[tuple[str, nn.Module]]:
    """Layers of the decoder that are skipped without an image (Mllama)."""
    layers = getattr(decoder, "layers", None)
    numbers = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    for number in numbers or () if isinstance(layers, nn.ModuleList) else ():
        if number < len(layers):  # type: ignore[arg-type]
            yield f"{_prefix(model, decoder)}layers.{number}", layers[number]  # type: ignore[index]


def _prefix(model: nn.Module, part: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def tower_weights(model: Any) -> int:
    """Numbers in the towers, those of sharded weights included."""
    parameters = {id(p): p for part in towers(model).values() for p in part.parameters()}
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters.values())


def freeze_towers(model: Any) -> None:
    """Takes the gradient from the towers of a transformers model; an adapter's parameters keep theirs."""
    for part in towers(model).values():
        for name, parameter in part.named_parameters():
            if "lora_" not in name:
                parameter.requires_grad_(False)


def towers_line(model: Any) -> str | None:
    """What is frozen of a multimodal model; None: it has no towers."""
    found = towers(model)
    if not found:
        return None
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    weights = tower_weights(model)
    share = f" of {total:,}" if total > weights else ""
    return (
        f"{type(model).__name__} is trained on text: {weights:,}{share} weights outside its text decoder "
        f"and head are frozen ({_grouped(list(found))})"
    )


def _grouped(names: list[str]) -> str:
    """Names, the numbers of layers of one list together."""
    lists: dict[str, list[str]] = {}
    for name in names:
        before, _, last = name.rpartition(".")
        lists.setdefault(before if last.isdigit() else name, []).append(last)
    parts = [
        f"{before}.{','.join(lasts)}" if lasts[0].isdigit() else before
        for before, lasts in lists.items()
    ]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")


# --- adapters ---


def without_towers(model: Any, config: PeftConfig) -> PeftConfig:
    """The config, which leaves the towers without an adapter; a copy where it changes."""
    names = list(towers(model))
    if not names or not hasattr(config, "exclude_modules"):
        return config
    changed: Any = copy.deepcopy(config)
    given = config.exclude_modules
    mine = "|".join(re.escape(name) for name in names)
    patterns = [rf"(?:{mine})(?:\..*)?"]
    if isinstance(given, str):
        patterns.insert(0, given)
    elif given:
        patterns.insert(0, rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(given)))})")
    changed.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns)
    return changed  # type: ignore[no-any-return]


# --- files of the processor ---


def processor_files(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> dict[str, bytes]:
    """Contents of the processor's files of a directory or hub name, by name; absent ones are left out."""
    found = {}
    for name in PROCESSOR_FILES:
        try:
            path = cached_file(
                str(source), name, revision=revision, local_files_only=local_files_only
            )
        except OSError:
            continue
        if path is not None:
            found[name] = Path(path).read_bytes()
    return found


def remember_processor(model: Any, files: Mapping[str, bytes]) -> None:
    """Notes on a model what `write_processor` is to write."""
    model._rpo_processor_files = dict(files)


def write_processor(model: Any, folder: Path) -> None:
    """Writes the processor's files of a multimodal model beside its weights, as they were.

    They are those of where it was loaded from: noted by the loader, or else in that directory or the hub's
    cache.
    """
    if not is_composite(model.config):
        return
    files = getattr(model, "_rpo_processor_files", None)
    if files is None:
        name = getattr(model, "name_or_path", "") or ""
        files = processor_files(name, local_files_only=True) if name else {}
        remember_processor(model, files)
    for name, content in files.items():
        (folder / name).write_bytes(content)
