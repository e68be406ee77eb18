"""What can be known of a model before its weights are loaded: whether it fits, and can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.foreign import reads
from rpo_trainer.loading import auto_class, check_tokens, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDEX = ".safetensors.index.json"


@reads("the model's configuration", lambda config, length, where, **_: where)
def check_context(config: Any, max_length: int, where: str, *, whose: str = "the model's") -> None:
    """Raises ModelError where `max_length` tokens are more than the model has positions for.

    A rope that is stretched (yarn, linear) reaches its factor times the length it was trained at.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and isinstance(rope.get("factor"), int | float):
        trained = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(trained * rope["factor"]))
    if limit is not None and max_length > limit:
        raise ModelError(
            f"max_length {max_length} is beyond {whose} context of {limit} tokens",
            where=where,
            why="the model has never seen positions so far out, if it has them at all",
            fix=f"max_length: {limit}, or less",
        )


@reads("the model", lambda *_, where, **__: where)
def check_unread(config: Any, folder: Path | None, *, tokens: int, reward: bool, where: str) -> int:
    """What can be seen of a model before its weights are read.

    Args:
        folder: where its files are; None: random weights, or a hub's.
        tokens: of the tokenizer.
        reward: a reward model will do too (see `auto_class`).

    Returns:
        The rows of its embeddings, as its configuration says; 0 where it does not.

    Raises:
        ModelError: weights in pickles alone, absent or cut, a reward model where a policy is wanted, more
            tokens than embeddings.
    """
    auto_class(config, reward=reward, where=where)
    if folder is not None:
        _check_safetensors(folder, where)
    rows = getattr(config.get_text_config(), "vocab_size", None) or 0
    if rows:
        check_tokens(rows, tokens, where)
    return int(rows)


def check_same_vocabulary(policy: int, reference: int, where: str | None = None) -> None:
    """Raises RecipeError where a reference has other numbers of embeddings than the policy."""
    if policy != reference:
        raise RecipeError(
            f"the reference has {reference} tokens, the policy {policy}",
            where=where,
            why="their log-probs would be of different tokens",
            fix="take a reference with the policy's tokenizer",
        )


@reads("the model's tokenizer", lambda tokenizer, folder, where: where)
def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> None:
    """Raises ModelError where a model's own tokenizer gives tokens other numbers than the recipe's does."""
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
            f"the model's tokenizer is another one: {other!r} is token {own[other]} there, and "
            f"{known[other]} of the recipe's",
            where=where,
            why="the tokens of the recipe's tokenizer would mean other words to it",
            fix="take a model with the tokenizer of `model`, or set `model.tokenizer`",
        )


def _check_safetensors(folder: Path, where: str) -> None:
    files = sorted(path.name for path in folder.iterdir())
    weights = [name for name in files if name.endswith((".safetensors", _INDEX))]
    for name in weights:
        try:
            if name.endswith(_INDEX):
                parts = json.loads((folder / name).read_text())["weight_map"].values()
                if lacking := sorted(set(parts) - set(files)):
                    raise ValueError(f"{lacking[0]} is missing")
            else:
                with safe_open(folder / name, "pt"):  # reads its head, and knows its length
                    pass
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"the model cannot be loaded: {name} is damaged, or no weights ({first_line(error)})",
                where=where,
                why="a part of its weights would be missing",
                fix="copy or download the model's files again (from git: `git lfs pull`)",
            ) from error
    if weights:
        return
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise ModelError(
            f"the model cannot be loaded: its weights are pickled ({pickles[0]})",
            where=where,
            why="a pickle can hold code, which runs when it is read",
            fix="take the model's safetensors, or convert them where you trust their origin: "
            "load them with transformers, then `save_pretrained`",
        )
    raise ModelError(
        "the model cannot be loaded: there are no weights beside its configuration",
        where=where,
        why="the stage could not begin",
        fix="give a directory with the model's files, its weights as safetensors",
    )
