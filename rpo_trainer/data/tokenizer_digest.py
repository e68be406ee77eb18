"""Digest of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpo_trainer.data.resumable_rows import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer: vocabulary, rules, special tokens, and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    plain = {
        name: value
        for name, value in sorted(tokenizer.init_kwargs.items())
        if isinstance(value, bool | int | str) and name != "name_or_path"
    }
    return content_key(
        type(tokenizer).__name__, rules, added, tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None), plain,
    )  # fmt: skip
