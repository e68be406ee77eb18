"""Checkpoints with vision or audio towers, trained on text: their class, decoder and towers.

The class is the checkpoint's own conditional one, so that outputs load as the checkpoint did. Its text
decoder, embeddings and head are trained; towers and projectors are not used in a forward of text and are
frozen.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rpo_trainer.errors import ModelError, first_line

if TYPE_CHECKING:
    from peft import PeftConfig

CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of these classes
_OWN_CODE = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
_FIX = (
    "use a causal language model, or a multimodal one whose forward accepts text only in this "
    "release of transformers"
)


# --- which class ---


def random_model(
    factory: Any, config: Any, *, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """Create a model with random weights.

    Args:
        factory: the result of `language_model_class`, or another Auto class.
        settings: `dtype`; by default that of the configuration.
    """
    if isinstance(factory, type) and issubclass(factory, PreTrainedModel):
        model: Any = factory(copy.deepcopy(config))
        return model.to(**settings) if settings else model
    auto: Any = factory
    return auto.from_config(config, trust_remote_code=trust_remote_code, **settings)


def is_composite(config: Any) -> bool:
    """Whether a configuration has other parts in addition to the text part."""
    return config.get_text_config() is not config


def is_multimodal(config: Any) -> bool:
    """Whether its models have parts in addition to a language model."""
    return is_composite(config) or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def language_model_class(config: Any, where: str) -> Any:
    """Return the class that loads a configuration's language model: an Auto class, or the one it names.

    `architectures` decides; without a class that transformers knows, a composite configuration means the
    conditional class and any other one the causal class. See `random_model` for `from_config`.

    Raises:
        ModelError: transformers has no language model for the configuration, or one that cannot run on text
            alone.
    """
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    known = {
        factory: _one_of(kind, named)
        for factory, mapping in (
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
        )
        if (kind := mapping.get(type(config), None)) is not None
    }
    chosen = next((f for f, kind in known.items() if kind.__name__ in named), None)
    if chosen is None and known:
        chosen = list(known)[-1 if is_composite(config) else 0]
    if chosen is not None:
        _require_text(known[chosen], config, where)
        return chosen
    code = getattr(config, "auto_map", None) or {}
    if (own := next((name for name in _OWN_CODE if name in code), None)) is not None:
        return getattr(transformers, own)  # requires `trust_remote_code`
    for kind in (getattr(transformers, name, None) for name in named):
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            _require_text(kind, config, where)
            return kind
    raise ModelError(
        f"transformers has no language model for the configuration of {_a(config)}",
        code="model.no-language-model",
        where=where,
        why="neither AutoModelForCausalLM nor AutoModelForMultimodalLM has a class for it"
        + (f", and its architectures ({', '.join(named)}) do not name one" if named else ""),
        fix=_FIX,
    )


def composite_config(model: Any) -> Any:
    """Return the composite configuration that lets an Auto class load a text part; None if not needed."""
    config, name = model.config, type(model).__name__
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_multimodal(config):
        return None
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if class_name != name or model_type not in CONFIG_MAPPING:
            continue
        kind: Any = CONFIG_MAPPING[model_type]
        if kind.sub_configs.get("text_config") is type(config):
            return kind(text_config=config.to_dict(), architectures=[name])
    return None


def _one_of(kinds: Any, named: list[str]) -> Any:
    """Return the class of a mapping's entry: of several, the named one, or the first."""
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return next((kind for kind in several if kind.__name__ in named), several[0])


def _a(config: Any) -> str:
    return f"a {getattr(config, 'model_type', None) or type(config).__name__} model"


def _require_text(kind: Any, config: Any, where: str) -> None:
    """Raise ModelError if a class cannot compute log-probs of text only, by its signature."""
    if getattr(config, "is_encoder_decoder", False) and is_multimodal(config):
        why = "it is an encoder-decoder, whose decoder requires the encoder's output for an image"
    elif getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        why = "its text attention is bidirectional: each token could attend to the one that it predicts"
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
        f"a {name} cannot be trained on text only",
        code="model.not-text-only",
        where=where,
        why=why,
        fix=_FIX,
    )


def require_text_forward(model: Any, where: str | None = None) -> None:
    """Raise ModelError if a composite model rejects a few tokens without an image or sound.

    Weights may be on the meta device; a forward that needs their values is then inconclusive.
    """
    if not is_multimodal(model.config):
        return
    name = type(model).__name__
    if name.endswith(CLASSIFIER):
        return
    if model.get_output_embeddings() is None:
        raise _not_on_text(name, "it has no language head", where)
    device = next(model.parameters()).device
    special = _tokens_of(model.config)
    token = next(number for number in range(len(special) + 1) if number not in special)
    tokens = torch.full((1, 2), token, device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise _not_on_text(name, f"its forward fails: {first_line(error)}", where) from error
    except (RuntimeError, IndexError):
        if device.type != "meta":
            raise
    finally:
        model.train(training)


def _tokens_of(config: Any) -> set[int]:
    """Return the token ids in a configuration, including those of images."""
    fields = {**vars(config.get_text_config()), **vars(config)}
    return {v for k, v in fields.items() if "token_i" in k and isinstance(v, int)}


def with_vocabulary(settings: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Add the tokenizer's size to the settings, in the text part of a composite configuration."""
    name = str(settings.get("model_type"))
    # Not `get`, which does not look among the classes that are still to be imported.
    if name not in CONFIG_MAPPING or "text_config" not in CONFIG_MAPPING[name].sub_configs:
        return {"vocab_size": vocabulary, **settings}
    text = {"vocab_size": vocabulary, **(settings.get("text_config") or {})}
    return {**settings, "text_config": text}


# --- the parts ---


def text_decoder(model: Any) -> Any:
    """Return the module that maps tokens to hidden states: `[B, T]` → `last_hidden_state [B, T, H]`.

    It holds the embeddings and not the head. `get_decoder` of some classes is a language model with its head,
    the head, or the model itself; then the modules inside are searched. Returns the model itself if there is
    none.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()

    def fits(part: Any) -> bool:
        inside = set(map(id, part.modules()))
        return id(embeddings) in inside and (head is None or id(head) not in inside)

    decoder: Any = model.get_decoder()
    if decoder is not None and decoder is not model and fits(decoder):
        return decoder
    root = decoder if isinstance(decoder, PreTrainedModel) else model
    parts = (p for p in root.modules() if isinstance(p, PreTrainedModel) and p is not model)
    return next((part for part in parts if fits(part)), model)


def decoder_of(model: Any) -> Any:
    """Return the module that computes the hidden states of a language model or sequence classifier."""
    plain_classifier = type(model).__name__.endswith(CLASSIFIER) and not is_composite(model.config)
    return model.base_model if plain_classifier else text_decoder(model)


def tower_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of a transformers model that a forward of text does not use, by name.

    They are those outside decoder, embeddings and head, and, inside the decoder, cross-attention layers and
    models of another configuration. Text-only models have none.
    """
    decoder, head = text_decoder(model), model.get_output_embeddings()
    unused = list(_cross_attention(model, decoder))
    text_parts: list[nn.Module] = [model]
    if is_multimodal(model.config):
        score = getattr(model, "score", None)  # of a classifier
        text_parts = [
            p for p in (decoder, model.get_input_embeddings(), head, score) if p is not None
        ]
        if not is_composite(model.config):  # its decoder holds the towers
            unused += _of_other_configs(decoder)
    not_used = {id(p) for part in unused for p in part.parameters()}
    used = {id(p) for part in text_parts for p in part.parameters()} - not_used
    return {name: p for name, p in model.named_parameters() if id(p) not in used}


def _of_other_configs(decoder: Any) -> Iterator[nn.Module]:
    """Yield the children of the decoder with a model of another configuration inside."""
    for child in decoder.children():
        if any(
            isinstance(part, PreTrainedModel) and type(part.config) is not type(decoder.config)
            for part in child.modules()
        ):
            yield child


def _cross_attention(model: Any, decoder: Any) -> Iterator[nn.Module]:
    """Yield the layers of the decoder that are skipped without an image (Mllama)."""
    layers = getattr(decoder, "layers", None)
    numbers = getattr(model.config.get_text_config(), "cross_attention_layers", None)
    if isinstance(layers, nn.ModuleList):
        yield from (layers[number] for number in numbers or () if number < len(layers))


def _tower_names(model: nn.Module) -> list[str]:
    """Return the largest modules that text does not use, and single parameters."""
    unused = {id(p) for p in tower_parameters(model).values()}

    def walk(prefix: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            inside = [id(p) in unused for p in child.parameters()]
            if inside and all(inside):
                yield prefix + name
            elif any(inside):
                yield from walk(f"{prefix}{name}.", child)
        yield from (
            prefix + name for name, p in module.named_parameters(recurse=False) if id(p) in unused
        )

    return list(walk("", model)) if unused else []


def freeze_towers(model: Any) -> None:
    """Freeze the towers of a transformers model; adapter parameters stay trainable."""
    for name, parameter in tower_parameters(model).items():
        if "lora_" not in name:
            parameter.requires_grad_(False)


def towers_line(model: Any) -> str | None:
    """Describe what is frozen of a multimodal model; None if it has no towers."""
    found = tower_parameters(model)
    if not found:
        return None
    weights, total = (sum(map(_numel, part)) for part in (found.values(), model.parameters()))
    return (
        f"{type(model).__name__} is trained on text: {weights:,} of {total:,} weights outside its text "
        f"decoder and head are frozen ({_grouped(_tower_names(model))})"
    )


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 holds parts


def _grouped(names: list[str]) -> str:
    """Join names; layer numbers of one list are joined too."""
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
    """Exclude the towers from an adapter's config; a copy if it changes."""
    names = _tower_names(model)
    if not names or not hasattr(config, "exclude_modules"):
        return config
    changed: Any = copy.deepcopy(config)
    existing = config.exclude_modules
    towers = "|".join(re.escape(name) for name in names)
    patterns = [rf"(?:{towers})(?:\..*)?"]
    if isinstance(existing, str):
        patterns.insert(0, existing)
    elif existing:
        patterns.insert(0, rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(existing)))})")
    changed.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns)
    return changed  # type: ignore[no-any-return]
