"""Models and tokenizers from a recipe: safetensors only, no code of strangers, errors that say what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
    if template is not None and (base_dir / template).is_file():
        template = str(base_dir / template)
    return set_chat_template(tokenizer, template)


def load_model(spec: ModelSpec, base_dir: Path, *, seed: int, vocabulary: int) -> PreTrainedModel:
    """The model that the first stage starts from.

    Weights are kept in float32 whatever `dtype` says: steps of 1e-7 are lost in bfloat16 weights.
    `dtype` is the arithmetic (autocast) of the stages.
    """
    if spec.from_config is not None:
        settings = {"vocab_size": vocabulary, **spec.from_config}
        try:
            config = AutoConfig.for_model(**settings)
            set_seed(seed)
            factory: Any = AutoModelForCausalLM
            model: Any = factory.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"no model can be made of this configuration: {error}", where="model.from_config"
            ) from error
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
    return model  # type: ignore[no-any-return]


def load_weights(folder: Path) -> PreTrainedModel:
    """A stage's output, or any local model directory."""
    if not (folder / "config.json").is_file():
        raise ModelError("there is no model here", where=str(folder))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )


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
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the {what} cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=f"model: {name}",
            fix="give a directory with the model's files (safetensors), or the name of one on the hub",
        ) from error
