"""Small tokenizers trained at run time, and substitutes for the recipe's specs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.data.audit import Audit

from .chat_shapes import SHAPES

SENTENCES = [
    "The cat sat on the mat and looked at the rain.",
    "user and assistant talk: what is two plus three? It is five.",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a little girl who liked the sun.",
] * 5

CHATML_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A byte-level BPE tokenizer with the given special tokens.

    `adds_begin`: it prepends its begin token to every text.
    """

    def make(
        specials: list[str],
        *,
        bos: str | None = None,
        eos: str | None = None,
        adds_begin: bool = False,
        chat_template: str | None = None,
    ) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(SENTENCES, trainer)
        if adds_begin:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def shaped(make_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """A tokenizer with the template and the tokens of one structure."""

    def make(name: str) -> Any:
        from tokenizers import AddedToken

        shape = SHAPES[name]
        fields = {"bos": shape.bos, "eos": shape.eos, "chat_template": shape.template}
        tokenizer = make_tokenizer(list(shape.specials), **fields)
        more = [AddedToken(text, special=False, normalized=False) for text in shape.added]
        tokenizer.add_tokens(more)
        return tokenizer

    return lru_cache(make)


@pytest.fixture
def chatml(make_tokenizer: Callable[..., Any]) -> Any:
    from rpo_trainer.data import set_chat_template

    return set_chat_template(make_tokenizer(CHATML_SPECIALS, eos="<|im_end|>"), "chatml")


@pytest.fixture
def plain_text(make_tokenizer: Callable[..., Any]) -> Any:
    """A tokenizer without a chat template, which prepends `<s>` and ends responses with `</s>`."""
    return make_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", adds_begin=True)


@pytest.fixture
def audit() -> Audit:
    return Audit()


@pytest.fixture(scope="session")
def source() -> Callable[..., Any]:
    """A substitute for the recipe's SourceSpec."""

    def make(path: str | None = None, **fields: Any) -> Any:
        names = ["task", "split", "format", "columns", "weight", "max_rows", "size", "seed"]
        names += ["special_tokens", "chat_template_kwargs", "model_kwargs"]
        return SimpleNamespace(path=path, **{**dict.fromkeys(names), **fields})

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a file in `tmp_path`, and return its name."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def trained_texts(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The text of each contiguous range of trained tokens."""
    runs: list[list[int]] = []
    previous = 0
    for token, trained in zip(ids, mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
