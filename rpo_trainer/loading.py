"""Models and tokenizers from a recipe: safetensors only, no code of strangers, clear errors."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from rpo_trainer.data import set_chat_template
from rpo_trainer.errors import ModelError

if TYPE_CHECKING:
    from rpo_trainer.recipe import ModelSpec

logger = logging.getLogger(__name__)

_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)
_CONFIGURATION_ERRORS = (ValueError, TypeError, KeyError, ArithmeticError, AttributeError)
# Fields that configurations take beside those they write.
_ALSO_TAKEN = frozenset({"attn_implementation", "rope_scaling", "rope_theta"})


def load_tokenizer(spec: ModelSpec, base_dir: Path) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, with its chat template."""
    if spec.tokenizer == "characters":
        from rpo_trainer.quickstart import character_tokenizer

        tokenizer: Any = character_tokenizer()
    else:
        name = spec.tokenizer or spec.name_or_path
        if name is None:
            raise ModelError(
                "a model made by from_config brings no tokenizer",
                where="model.tokenizer",
                fix="name one: a directory, a hub name, or `characters`",
            )
        tokenizer = _load(AutoTokenizer, name, base_dir, spec, what="tokenizer")
    template = spec.chat_template
    if template is not None and (path := base_dir / Path(template).expanduser()).is_file():
        template = str(path)
    return set_chat_template(tokenizer, template)


def load_model(spec: ModelSpec, base_dir: Path, *, seed: int, vocabulary: int) -> PreTrainedModel:
    """The model that the first stage starts from.

    Weights are kept in float32 whatever `dtype` says: steps of 1e-7 are lost in bfloat16 weights.
    `dtype` is the arithmetic (autocast) of the stages.
    """
    if spec.from_config is not None:
        model: Any = _random_model({"vocab_size": vocabulary, **spec.from_config}, seed)
    else:
        assert spec.name_or_path is not None  # the schema
        model = _load(
            AutoModelForCausalLM,
            spec.name_or_path,
            base_dir,
            spec,
            what="model",
            dtype=torch.float32,
            use_safetensors=True,
        )
    check_vocabulary(model, vocabulary)
    return _named(model, spec.name_or_path or "")


def _random_model(settings: dict[str, Any], seed: int) -> Any:
    where = "model.from_config"
    try:
        known = AutoConfig.for_model(settings["model_type"])
        config = AutoConfig.for_model(**settings)
    except (*_CONFIGURATION_ERRORS, StrictDataclassError) as error:
        # Of an unknown model_type, what follows is the list of all known ones.
        what = _last_line(error).split(" Should contain one of")[0]
        raise ModelError(
            f"this is no configuration of a model: {type(error).__name__}: {what}", where=where
        ) from error
    for name in settings:
        if name in _ALSO_TAKEN or name in known.to_dict() or hasattr(known, name):
            continue
        near = difflib.get_close_matches(name, known.to_dict(), n=1)
        raise ModelError(
            f"a {settings['model_type']} has no field `{name}`",
            where=where,
            why="it would be ignored",
            fix=f"did you mean `{near[0]}`?" if near else "remove it",
        )
    set_seed(seed)
    factory: Any = AutoModelForCausalLM
    try:
        return factory.from_config(config, dtype=torch.float32)
    except (*_CONFIGURATION_ERRORS, RuntimeError) as error:
        raise ModelError(
            f"no model can be made of this configuration: {type(error).__name__}: "
            f"{_last_line(error).split(' Model type should be one of')[0]}",
            where=where,
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: Exception) -> str:
    return [type(error).__name__, *str(error).strip().splitlines()][-1].strip()


def load_weights(folder: Path) -> PreTrainedModel:
    """A stage's output, or any local model directory; float32.

    Raises:
        ModelError: there is no model, or none in safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ModelError("there is no model here", where=str(folder))
    factory: Any = AutoModelForCausalLM
    try:
        model = factory.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"the model cannot be loaded: {_first_line(error)}",
            where=str(folder),
            fix="give a directory with the model's files, its weights as safetensors",
        ) from error
    return _named(model, "")


def _named(model: Any, name: str) -> PreTrainedModel:
    """The model, told to have come from `name`: an adapter writes it, and a run can be moved."""
    model.name_or_path = model.config._name_or_path = name
    return model  # type: ignore[no-any-return]


def check_vocabulary(model: Any, tokens: int) -> None:
    """Raises ModelError where the tokenizer has more tokens than the model has embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens, the model {rows} embeddings",
            where="model",
            why="a token beyond the table cannot be embedded",
            fix="take the model's own tokenizer, or resize the model's embeddings first",
        )


def _load(
    factory: Any, name: str, base_dir: Path, spec: ModelSpec, *, what: str, **settings: Any
) -> Any:
    local = base_dir / Path(name).expanduser()
    where = str(local) if local.exists() else name
    try:
        return factory.from_pretrained(
            where,
            revision=spec.revision or "main",
            trust_remote_code=spec.trust_remote_code,
            **settings,
        )
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"the {what} cannot be loaded: {_first_line(error)}",
            where=f"model: {name}",
            fix="give a directory with the model's files (safetensors), or a hub name",
        ) from error
