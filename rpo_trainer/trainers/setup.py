"""Prepares model and tokenizer for a trainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import ProcessorMixin, TrainingArguments, set_seed

from rpo_trainer.data import set_chat_template
from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.models import adapters
from rpo_trainer.models.adapter_methods import is_adapted, require_supported_adapter
from rpo_trainer.models.adapter_parts import require_trained_parts, warn_of_random
from rpo_trainer.models.loading import load_model_named, load_tokenizer_named
from rpo_trainer.models.multimodal import freeze_towers, require_text_forward, towers_line
from rpo_trainer.models.quantization import disable_bnb_cpu_bf16
from rpo_trainer.models.sharding import is_replicated
from rpo_trainer.models.unwrap import is_classifier, transformers_model, unwrap_prepared_model
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.layout_probe import probe_on_all_ranks
from rpo_trainer.trainers.argument_status import defaults_of
from rpo_trainer.trainers.base_config import BaseConfig

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)


def require_config(trainer: Any, args: Any) -> None:
    """Raise RecipeError if `args` is not a config of the trainer, or has an invalid value.

    The attributes of a config may have been changed since it was created.
    """
    wanted = trainer.config_class
    if not isinstance(args, wanted):
        kind = type(args)
        raise RecipeError(
            f"{type(trainer).__name__} requires a {_full_name(wanted)}, got a {_full_name(kind)}",
            code="training.wrong-config",
            details={"wanted": _full_name(wanted), "given": _full_name(kind)},
            where="args",
            fix=f"from rpo_trainer import {wanted.__name__}; it has all fields of TrainingArguments",
        )
    kwargs = args.accelerator_config.gradient_accumulation_kwargs
    if kwargs and kwargs.get("num_steps") == 1:
        kwargs.pop("num_steps")
    args.check()


def _full_name(kind: type) -> str:
    public = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    return public if kind.__module__ != "builtins" else kind.__name__


def prepare_model(
    model: str | nn.Module, tokenizer: Any, peft_config: PeftConfig | None, args: BaseConfig
) -> tuple[nn.Module, Any]:
    """Return the model that is trained, with its adapter, and its tokenizer.

    Args:
        model: the model, or its name or path.
        tokenizer: the trainer's `processing_class`; None: the tokenizer of the model's name or path.
    """
    if isinstance(model, str):
        settings = loading_settings(model, args)
        tokenizer = tokenizer or load_tokenizer_named(model, settings)
        dtype = loaded_dtype(args, peft_config)
        module: nn.Module = load_model_named(model, dtype=dtype, settings=settings)
    else:
        module = unwrap_prepared_model(model)
        # `RewardTrainer` may have loaded a classifier itself.
        settings = {} if is_classifier(module) else loading_settings(model, args)
    module = with_adapter(module, peft_config, args.seed)
    tokenizer = tokenizer_in(tokenizer) or tokenizer_of(module, settings)
    set_tokens(tokenizer, args)
    set_checkpointing(module, args)
    return module, tokenizer


def loaded_dtype(args: BaseConfig, peft_config: PeftConfig | None) -> torch.dtype:
    """Return the dtype in which a named model is loaded: under an adapter, that of the computation.

    Trained weights are float32, and all weights under DeepSpeed, which requires a single dtype.
    """
    half = args.mixed_precision_dtype()
    if peft_config is None or half is None or getattr(args, "deepspeed_plugin", None) is not None:
        return torch.float32
    return half


def loading_settings(model: str | nn.Module, args: BaseConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for what a trainer loads itself.

    Raises:
        RecipeError: `model_init_kwargs` for a model that is loaded already.
    """
    given: Any = args.model_init_kwargs  # a dict, once the config has read it
    settings: dict[str, Any] = dict(given or {})
    if args.model_init_kwargs and not isinstance(model, str):
        raise RecipeError(
            "model_init_kwargs has no effect: the model is loaded already",
            code="training.no-effect",
            details={"settings": ["model_init_kwargs"]},
            where=type(args).__name__,
            fix="pass the name of the model as `model`, or remove model_init_kwargs",
        )
    if args.trust_remote_code is not None:
        settings["trust_remote_code"] = args.trust_remote_code
    return settings


def set_tokens(tokenizer: Any, args: BaseConfig) -> None:
    """Set the tokens and the chat template that the config names on the tokenizer.

    Raises:
        RecipeError: the tokenizer has no such token.
        ModelError: the template cannot be read.
    """
    for name in ("pad_token", "eos_token"):
        token = getattr(args, name, None)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise RecipeError(
                f"{name}={token!r} is not a token of the tokenizer",
                code="training.unknown-token",
                details={"settings": [name]},
                where=type(args).__name__,
                fix=f"use one of its tokens, or add the token to tokenizer and model and remove {name}",
            )
        setattr(tokenizer, name, token)
    if (path := getattr(args, "chat_template_path", None)) is not None:
        set_chat_template(tokenizer, path)


def set_checkpointing(model: nn.Module, args: BaseConfig) -> None:
    """Turn gradient checkpointing off if it is only the default and the model does not support it.

    If the config turns it off, it is also turned off in a model from an earlier training, which transformers
    does not do.

    Raises:
        RecipeError: it was set explicitly, and the model does not support it.
    """
    able = any(getattr(m, "supports_gradient_checkpointing", False) for m in model.modules())
    if args.checkpointing_is_default:
        args.set_default_checkpointing(able)
        if not able:
            logger.info("gradient checkpointing is off: the model does not support it")
    if not args.gradient_checkpointing:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.gradient_checkpointing = False  # type: ignore[assignment]
        if args.gradient_checkpointing_kwargs and is_main():
            logger.warning(
                "gradient_checkpointing_kwargs have no effect: gradient checkpointing is off"
            )
    elif not able:
        raise RecipeError(
            f"{type(transformers_model(model)).__name__} does not support gradient checkpointing",
            code="model.no-gradient-checkpointing",
            where="gradient_checkpointing",
            fix="set gradient_checkpointing=False",
        )


def stop_input_gradients(model: nn.Module, args: Any) -> None:
    """Remove the hooks of transformers that make outputs of frozen embeddings require gradients.

    Only reentrant checkpointing needs them. They add the backward pass below the first adapter, and fail in
    models that change their embeddings in place.
    """
    if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
        transformers_model(model).disable_input_require_grads()


def note_defaults(args: BaseConfig) -> None:
    """Log a WARNING, once per process, about settings with a default that differs from TRL's."""
    if not args.compared_with_trl or not is_main():
        return
    own = defaults_of(type(args))
    found = [
        f"{name}={own[name]} (TRL {differs.trl})"
        for name, differs in args.trl_defaults.items()
        if differs.trl and getattr(args, name) == own[name]
    ]
    if found := [*found, *args.unlike_trl]:
        _warn_once(f"defaults that differ from TRL's: {'; '.join(found)}")


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def require_one_gpu(args: TrainingArguments) -> None:
    """Raise RecipeError if transformers would use DataParallel over several GPUs."""
    if args.n_gpu > 1:
        raise RecipeError(
            f"{args.n_gpu} GPUs are visible to one process",
            code="training.several-gpus",
            why="each process uses one GPU",
            fix="start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0",
        )


def with_adapter(model: nn.Module, peft_config: PeftConfig | None, seed: int) -> nn.Module:
    """Return the model with a new adapter if there is a `peft_config`; check an existing adapter."""
    disable_bnb_cpu_bf16(model)
    require_kept_padding(transformers_model(model))
    _freeze_towers(transformers_model(model), adapted=peft_config is not None or is_adapted(model))
    if peft_config is None:
        require_supported_adapter(model)
        if is_adapted(model):
            require_trained_parts(model)
        else:
            warn_of_random(model)
    else:
        # A resumed run must initialize the adapter the same way.
        set_seed(seed)
        model = adapters.with_adapter(model, peft_config)
    halves = {p.dtype for p in model.parameters() if p.requires_grad} & {
        torch.bfloat16,
        torch.float16,
    }
    if halves and is_main():
        logger.warning(
            "the trained weights are %s: small updates are lost to rounding (bfloat16 has 8 significant "
            "bits, float16 11). Load the model with dtype=torch.float32, and set bf16=True for autocast",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves)),
        )  # fmt: skip
    return model


def require_kept_padding(model: Any) -> None:
    """Check that loading the saved model does not change the embedding of its padding token.

    A head that is tied to the embeddings trains that row: a WARNING is logged that it is loaded as zeros.

    Raises:
        ModelError: the row is not zero, and transformers would set it to zero.
    """
    embedding = model.get_input_embeddings()
    place = getattr(embedding, "padding_idx", None)
    if place is None or not is_replicated(model) or not _zeroed_when_loaded(model, place):
        return
    name = type(model).__name__
    if embedding.weight[place].any():
        raise ModelError(
            f"transformers sets the embedding of token {place} to zero whenever it loads a {name}, and this "
            "model's is not zero",
            code="model.padding-row",
            why="the saved model would produce different outputs after it is loaded",
            fix=f"zero that row of the embeddings, or set padding_idx of the {type(embedding).__name__} "
            "and pad_token_id of the config to None",
        )
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    if tied and embedding.weight.requires_grad and is_main():
        logger.warning(
            "transformers sets the embedding of token %d to zero whenever it loads a %s: training changes it "
            "through the tied head, and these changes are lost when the output is loaded",
            place, name,
        )  # fmt: skip


def _zeroed_when_loaded(model: Any, place: int) -> bool:
    """Whether the class re-initializes the padding row of an embedding that is marked as loaded."""
    if model.is_remote_code():
        return False  # transformers does not re-initialize their weights
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        trial = nn.Embedding(place + 1, 1, padding_idx=place)
        trial.weight.fill_(1.0)
        trial.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(trial)
        return not bool(trial.weight[place].any())


def _freeze_towers(inner: Any, *, adapted: bool) -> None:
    """Freeze the parts of a multimodal model that text does not use, with a WARNING."""
    line = towers_line(inner)
    if line is None:
        return
    if not getattr(inner, "_rpo_complete", False) and is_replicated(inner):
        require_text_forward(inner)
    freeze_towers(inner)
    if is_main():
        logger.warning("%s%s", line, "; a new adapter does not include them" if adapted else "")


def tokenizer_in(processing_class: Any) -> Any:
    """Return the tokenizer of a multimodal processor; any other processing class unchanged."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    inside: Any = processing_class.tokenizer
    if not inside.chat_template:
        inside.chat_template = processing_class.chat_template
    return inside


def tokenizer_of(model: nn.Module, settings: Mapping[str, Any] | None = None) -> Any:
    """Return the tokenizer of the name or path that the model was loaded from.

    Args:
        settings: see `loading_settings`.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise ModelError(
            "there is no tokenizer",
            code="tokenizer.missing",
            why="the model has no name or path from which to load its tokenizer",
            fix="pass processing_class=tokenizer",
        )
    return load_tokenizer_named(name, settings)


def proved_layout(model: nn.Module, args: BaseConfig, longest: int | None) -> Layout:
    """Return the layout of the config; for `auto`, the fastest that reproduces the model's own log-probs.

    Args:
        longest: tokens of the longest text, see `fits.longest_text`.
    """
    wanted: Any = None if args.layout == "auto" else args.layout
    with adapters.randomized_zero_init(model):
        layout, _ = probe_on_all_ranks(
            model, layout=wanted, logits_chunk_bytes=args.logits_chunk_bytes, longest=longest,
            autocast=args.mixed_precision_dtype(),
        )  # fmt: skip
    return layout


def pad_token_id_of(tokenizer: Any) -> int:
    """Return the pad token, or else the end token, or else 0; it is always masked."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def flops_per_token(model: nn.Module) -> int:
    """Return 6 FLOPs per weight, without embeddings, as transformers estimates forward and backward."""
    count: Any = getattr(model, "num_parameters", None)
    return 0 if count is None else 6 * int(count(exclude_embeddings=True))
