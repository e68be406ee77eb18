"""Checks of a model before its weights are loaded: whether it fits and is readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification

from rpo_trainer.errors import ModelError, RecipeError, first_line
from rpo_trainer.models.from_config import auto_class
from rpo_trainer.models.from_pretrained import check_stored
from rpo_trainer.models.loading import check_tokens, saved_config
from rpo_trainer.models.multimodal import (
    is_multimodal,
    random_model,
    require_text_forward,
    towers_line,
)
from rpo_trainer.models.saved_files import (
    check_savable,
    read_generation,
    repair_generation,
    warn_repaired,
)
from rpo_trainer.models.weight_files import weight_files
from rpo_trainer.runtime.file_errors import reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@reads("the model's configuration", lambda config, length, where, **_: where)
def check_context(config: Any, max_length: int, where: str, *, whose: str = "the model's") -> None:
    """Raise ModelError if `max_length` tokens are more than the model has positions for.

    A scaled RoPE (yarn, linear) reaches its factor times the length it was trained at.
    """
    limit = positions_of(config)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"max_length {max_length} exceeds {whose} context of {limit} tokens",
            code="model.context-exceeded",
            details={"limit": limit},
            where=where,
            why="the model was not trained on later positions, and may have no embeddings for them",
            fix=f"max_length: {limit}, or less",
        )


def positions_of(config: Any) -> int | None:
    """Return the context length of a model, scaled RoPE included; None if its config has no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and limit < 1:  # XLNet's -1
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and isinstance(rope.get("factor"), int | float):
        trained = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(trained * rope["factor"]))
    return limit


@reads("the model", lambda *_, where, **__: where)
def check_unread(
    config: Any,
    folder: Path | None,
    *,
    tokens: int,
    reward: bool,
    where: str,
    trust_remote_code: bool = False,
) -> int:
    """Check what is known of a model before its weights are loaded.

    Args:
        folder: where its files are; None: random weights, or a hub's.
        tokens: of the tokenizer.
        reward: accept a reward model too (see `auto_class`).

    Returns:
        The rows of its embeddings according to its configuration; 0 if unknown.

    Raises:
        ModelError: weights that are pickled, missing or truncated; tensors that are missing, unexpected or of
            another shape; a reward model instead of a policy; more tokens than embeddings.
    """
    factory = auto_class(config, reward=reward, where=where)
    if folder is not None:
        check_safetensors(folder, where, config)
        check_stored(factory, config, folder, where, trust_remote_code=trust_remote_code)
    rows = getattr(config.get_text_config(), "vocab_size", None) or 0
    if rows:
        check_tokens(rows, tokens, where)
    return int(rows)


@reads("the model", lambda config, *, where, **_: where)
def check_towers(
    config: Any, *, reward: bool, where: str, trust_remote_code: bool = False
) -> str | None:
    """Describe what is frozen of a multimodal model, from its configuration; None if nothing or not known.

    Raises:
        ModelError: its forward does not accept text without other inputs.
    """
    if not is_multimodal(config):
        return None
    factory = auto_class(config, reward=reward, where=where)
    try:
        with torch.device("meta"):
            model = random_model(factory, config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError, ImportError):
        return None  # reported where the model is created
    require_text_forward(model, where)
    return towers_line(model)


def check_scorer(folder: Path, where: str) -> None:
    """Raise ModelError if a directory does not contain a complete reward model."""
    config = saved_config(folder, where)
    check_safetensors(folder, where, config)
    check_stored(AutoModelForSequenceClassification, config, folder, where)


def check_written(
    config: Any, folder: Path | None, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> str | None:
    """Save the files that a stage writes next to the weights, as a test.

    Args:
        folder: of the model; None if it has no generation config.

    Returns:
        A warning about fields of the generation config that are not saved, or None.

    Raises:
        ModelError: the config, the generation config or the tokenizer cannot be saved.
    """
    generation = None if folder is None else read_generation(folder, where)
    removed = [] if generation is None else repair_generation(generation, where)
    check_savable(
        {"model's config": config, "generation config": generation, "tokenizer": tokenizer},
        where=where,
    )
    return warn_repaired(removed, where)


def check_same_vocabulary(policy: int, reference: int, where: str | None = None) -> None:
    """Raise RecipeError if the reference model and the policy have different numbers of embeddings."""
    if policy != reference:
        raise RecipeError(
            f"the reference model has {reference} tokens, the policy {policy}",
            code="tokenizer.mismatch",
            where=where,
            why="their log-probs would refer to different tokens",
            fix="use a reference model with the policy's tokenizer",
        )


@reads("the model's tokenizer", lambda tokenizer, folder, where: where)
def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> None:
    """Raise ModelError if a model's tokenizer assigns other ids to tokens than the recipe's."""
    if not (folder / "tokenizer.json").is_file():
        return  # nothing to compare with
    text = (folder / "tokenizer.json").read_text(encoding="utf-8", errors="replace")
    try:
        own = json.loads(text)["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return
    if not isinstance(own, dict):  # unigram models: a list of pieces with their scores
        own = {piece: number for number, (piece, _) in enumerate(own)}
    known = tokenizer.get_vocab()
    other = next((t for t, i in own.items() if known.get(t, i) != i), None)
    if other is not None:
        raise ModelError(
            f"the model has a different tokenizer: {other!r} has id {own[other]} in it, and "
            f"{known[other]} in the recipe's",
            code="tokenizer.mismatch",
            details={"token": other, "ids": (own[other], known[other])},
            where=where,
            why="token ids of the recipe's tokenizer have another meaning for this model",
            fix="use a model with the tokenizer of `model`, or set `model.tokenizer`",
        )


def check_safetensors(folder: Path, where: str, config: Any = None) -> None:
    """Raise ModelError if a directory has no safetensors weights, or damaged ones.

    Only files that transformers reads are checked (see `weight_files`).
    """
    files = sorted(path.name for path in folder.iterdir())
    name = "the index of its weights"
    try:
        weights = weight_files(folder, config)
        for path in weights:
            name = path.name
            if name not in files and path.parent == folder:
                raise ValueError("it is missing")
            with safe_open(path, "pt"):  # reads the header and checks the length
                pass
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"the model cannot be loaded: {name} is damaged or not a safetensors file "
            f"({first_line(error)})",
            code="model.damaged-weights",
            where=where,
            why="some weights would be missing",
            fix="copy or download the model's files again (from git: `git lfs pull`)",
        ) from error
    if weights:
        return
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise ModelError(
            f"the model cannot be loaded: its weights are pickled ({pickles[0]})",
            code="model.pickled-weights",
            where=where,
            why="a pickle can contain code, which runs when it is loaded",
            fix="use safetensors weights; or, if you trust their origin, convert them: load them with "
            "transformers, then `save_pretrained`",
        )
    others = [name for name in files if name.endswith(".safetensors")]
    found = f", only {others[0]}, which transformers does not read" if others else ""
    raise ModelError(
        f"the model cannot be loaded: there are no weights next to its configuration{found}",
        code="model.no-weights",
        where=where,
        why="the stage could not start",
        fix="give a directory with the model's files and safetensors weights",
    )
