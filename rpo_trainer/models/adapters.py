"""PEFT adapters: created, loaded and merged without a change of the model's outputs.

This is verified on a few random tokens: a new adapter must not change the log-probs, and a merged model must
have those of the adapted one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpo_trainer.errors import ModelError, first_line
from rpo_trainer.models.adapter_files import WEIGHTS, require_complete, require_weights
from rpo_trainer.models.adapter_methods import (
    is_adapted,
    require_plain_start,
    require_supported_method,
)
from rpo_trainer.models.adapter_parts import warn_of_fused_experts, with_new_parts
from rpo_trainer.models.dtypes import LOW, adapter_in_float32
from rpo_trainer.models.multimodal import without_towers
from rpo_trainer.models.saved_files import read_generation
from rpo_trainer.models.sharding import is_replicated
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime.file_errors import device_failed, reads

if TYPE_CHECKING:
    from peft import PeftConfig


# --- new adapters ---


def with_adapter(model: nn.Module, config: PeftConfig) -> nn.Module:
    """Add a new adapter, which does not change the model's outputs.

    Raises:
        ModelError: the model already has an adapter, the method is not supported, or the outputs change.
    """
    from peft import get_peft_model

    if is_adapted(model):
        raise ModelError(
            "peft_config was given for a model that already has an adapter",
            code="adapter.already-adapted",
            why="only one adapter is trained",
            fix="omit peft_config, or merge the adapter first (model.merge_and_unload())",
        )
    if getattr(transformers_model(model), "_rpo_text_part", False):
        raise ModelError(
            "a reward model of the text part of a multimodal checkpoint cannot be trained with an adapter",
            code="adapter.text-part",
            why="the base of the adapter would be the full checkpoint, which has no sequence classifier",
            fix="train all weights: omit peft_config (`peft` in a recipe)",
        )
    require_supported_method(config)
    require_plain_start(config)
    config = without_towers(transformers_model(model), with_new_parts(model, config))
    before = _answers(model)
    random_state = torch.get_rng_state()
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"PEFT rejects the adapter's settings: {error}",
            code="adapter.bad-config",
            where="peft",
            why="the settings conflict with each other or with this model",
            fix="correct them: target_modules names layers of the model; r and lora_alpha are numbers",
        ) from error
    if adapter_in_float32(wrapped):
        _draw_again(wrapped, config, random_state)
    try:
        _require_same(
            wrapped, before,
            what="the adapter changes the model before training",
            code="adapter.changes-model",
            fix="use another initialization (init_lora_weights: true, pissa, olora, ...)",
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if device_failed(error):
            raise
        odd = ", ".join(_odd_targets(wrapped))
        raise ModelError(
            "the forward pass fails with this adapter"
            + (f": the targets {odd} do not compute a plain linear layer" if odd else ""),
            code="adapter.forward-fails",
            where="peft",
            why=first_line(error),
            fix="exclude these modules with exclude_modules, or list only the others in target_modules",
        ) from error
    warn_of_fused_experts(wrapped, config)
    return wrapped  # type: ignore[no-any-return]


def _draw_again(wrapped: nn.Module, config: PeftConfig, random_state: Tensor) -> None:
    """Draw the random weights of a LoRA adapter in float32, from the same random state.

    PEFT draws them in the dtype of the base. An engine that keeps a bfloat16 base in float32 would otherwise
    start from other values.
    """
    from peft.tuners.lora import LoraLayer

    start = getattr(config, "init_lora_weights", None)
    if start is not True and start != "gaussian":
        return
    if any(parameter.device.type != "cpu" for parameter in wrapped.parameters()):
        return  # drawn from the state of another device
    torch.set_rng_state(random_state)
    layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name in layer.r:
            layer.reset_lora_parameters(name, start)


def _odd_targets(wrapped: nn.Module) -> list[str]:
    """Return the names of adapted linear layers whose class overrides forward."""
    layers = ((name, getattr(part, "base_layer", None)) for name, part in wrapped.named_modules())
    return sorted(
        {
            name.rpartition(".")[2]
            for name, layer in layers
            if isinstance(layer, nn.Linear)
            and type(layer).forward is not nn.Linear.forward
            and not type(layer).__module__.startswith("bitsandbytes")
        }
    )


@contextmanager
def randomized_zero_init(model: nn.Module) -> Iterator[None]:
    """Set zero-initialized adapter parameters to random values inside, so that they have an effect."""
    zeros = [
        p
        for p in (model.parameters() if is_adapted(model) and is_replicated(model) else ())
        if p.requires_grad and p.is_floating_point() and not p.any()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in zeros:
                p.copy_(torch.randn(p.shape, generator=generator, device="cpu") * 0.02)
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def starts_as(model: nn.Module, other: nn.Module) -> bool:
    """Whether an adapted model has the weights of another one below an adapter without effect."""
    if not is_adapted(model) or is_adapted(other) or not is_replicated(model):
        return False
    below, other_state = _base_state(model), other.state_dict()
    if below.keys() != other_state.keys() or not all(
        t.dtype == other_state[n].dtype and torch.equal(t.to(other_state[n].device), other_state[n])
        for n, t in below.items()
    ):
        return False
    with model.disable_adapter():  # type: ignore[operator]
        before = _answers(model)
    return _largest_difference(model, before) < 1e-4


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base weights under their names without the adapter."""
    state = {}
    for name, tensor in transformers_model(model).state_dict().items():
        plain = re.sub(r"(\.base_layer)+\.", ".", name).replace(".original_module.", ".")
        if plain != name or not any(mark in name for mark in ("lora_", ".modules_to_save.")):
            state[plain] = tensor
    return state


# --- outputs of a model ---


def lowest_precision(model: nn.Module) -> torch.dtype:
    """Return the dtype that limits how closely two computations of an output can agree."""
    for module in model.modules():
        compute = getattr(module, "compute_dtype", None)  # of bitsandbytes' linear layers
        if compute in LOW:
            return compute  # type: ignore[no-any-return]
    return next(model.parameters()).dtype


def _answers(model: nn.Module) -> Tensor | None:
    """Return log-probs (or scores) for a few random tokens, or None if the weights are sharded."""
    if not is_replicated(model):
        return None
    inner = transformers_model(model)
    vocabulary = inner.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 12), generator=generator, device="cpu")
    ids = ids.to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)
    return logits if is_classifier(inner) else logits.log_softmax(-1)


def _largest_difference(model: nn.Module, expected: Tensor | None) -> float:
    actual = _answers(model)
    if actual is None or expected is None:
        return 0.0
    return (actual - expected.to(actual.device)).abs().max().item()


def _require_same(
    model: nn.Module, expected: Tensor | None, *, what: str, code: str, fix: str
) -> None:
    off = _largest_difference(model, expected)
    if not off <= (0.25 if lowest_precision(model) in LOW else 1e-3):
        raise ModelError(what, code=code, why=f"its log-probs change by {off:.2g} nats", fix=fix)


# --- on disk ---


@reads("the adapter", lambda base, folder, **_: str(folder))
def load_adapter(base: PreTrainedModel, folder: Path, *, trainable: bool) -> nn.Module:
    """Load a saved adapter in float32 onto its base.

    Raises:
        ModelError: the adapter does not belong to this model, or its method is not supported.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    require_weights(folder, str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        require_supported_method(config)
        model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
        if adapter_in_float32(model):
            # They were read into the dtype of the base, which rounds them.
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        require_complete(model, folder)
    except KeyError as error:  # from PEFT, for a module that is saved in full
        raise ModelError(
            f"the adapter's file does not match its configuration; missing: {error.args[0]}",
            code="adapter.tensor-mismatch",
            details={"missing": [str(error.args[0])]},
            where=str(folder / WEIGHTS),
            why="the loaded adapter would differ from the saved one",
            fix="copy the adapter again",
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        if device_failed(error):
            raise
        raise ModelError(
            "the adapter cannot be loaded",
            code="adapter.cannot-load",
            where=str(folder),
            why=first_line(error),
            fix="give the directory of a PEFT adapter of this model, its weights as safetensors",
        ) from error
    generation = read_generation(folder, str(folder))
    if generation is not None:
        transformers_model(model).generation_config = generation
    return model  # type: ignore[no-any-return]


def check_unread(folder: Path, base: nn.Module, where: str) -> None:
    """Raise ModelError if `load_adapter` would, from the headers of the adapter's file.

    Args:
        base: the model that the adapter belongs to, on the meta device; modified in place.
    """
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
        require_supported_method(config)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # the file has the weights
        with torch.device("meta"):
            model: Any = get_peft_model(base, config)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the adapter cannot be loaded",
            code="adapter.cannot-load",
            where=where,
            why=first_line(error),
            fix="give the directory of a PEFT adapter of this model, its weights as safetensors",
        ) from error
    require_complete(model, folder)


# --- merging ---


def merged(model: Any) -> PreTrainedModel:
    """Merge the adapter into the model, which stays trainable and has the same outputs.

    Tied embeddings and head are untied if the adapter has changed only one of them.

    Raises:
        ModelError: the method cannot be merged, or the merged model has other outputs.
    """
    before = _answers(model)
    tied = _untie(model.get_base_model())
    try:
        plain: Any = model.merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(
            "the adapter cannot be merged",
            code="adapter.cannot-merge",
            why=str(error),
            fix="use `between_stages: keep` without `merge`, or a method that can be merged",
        ) from error
    if tied:
        _tie_again(plain)
    _require_same(
        plain, before,
        what="merging the adapter changes the model's outputs",
        code="adapter.merge-changes-model",
        fix="use `between_stages: keep` without `merge`, or report the method",
    )  # fmt: skip
    return plain.requires_grad_()  # type: ignore[no-any-return]


def _untie(model: Any) -> bool:
    """Untie the head, because merging into a shared weight would change the embeddings too."""
    head = model.get_output_embeddings()
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    found = False
    for module in () if head is None else head.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(p) in shared:
                setattr(module, name, nn.Parameter(p.detach().clone(), p.requires_grad))
                found = True
    return found


def _tie_again(model: Any) -> None:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = torch.equal(embeddings.weight, head.weight)
    if tied:
        head.weight = embeddings.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
