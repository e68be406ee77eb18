"""Special tokens during training: aligned as by transformers' Trainer, without its warning."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from transformers.trainer_utils import align_special_tokens

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.models.saved_files import Written
from tests.small_models import make_model

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids(model: Any) -> dict[str, Any]:
    owners = {"config": model.config, "generation": model.generation_config}
    return {f"{k}.{n}": getattr(o, n) for k, o in owners.items() if o is not None for n in _TOKENS}


@pytest.mark.parametrize("config_ends", [None, 5, "own", [5, 6], [5, "own"]])
@pytest.mark.parametrize("generation_ends", ["no config", None, 7, "own", [7, "own"]])
def test_aligned_as_transformers_does(
    config_ends: Any, generation_ends: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = character_tokenizer()
    own = tokenizer.eos_token_id

    def ends(value: Any) -> Any:
        return (
            [ends(v) for v in value]
            if isinstance(value, list)
            else own
            if value == "own"
            else value
        )

    model = make_model(vocab_size=len(tokenizer))
    model.config.eos_token_id, model.config.pad_token_id = ends(config_ends), None
    if generation_ends == "no config":
        model.generation_config = None
    else:
        model.generation_config.eos_token_id = ends(generation_ends)
    theirs = copy.deepcopy(model)
    before = ids(model)
    written = Written(model, tokenizer)
    written.remember()
    written.align(tokenizer)
    align_special_tokens(theirs, tokenizer)
    assert ids(model) == ids(theirs) != before
    with caplog.at_level(logging.WARNING, "transformers"):
        caplog.clear()
        align_special_tokens(model, tokenizer)
    assert caplog.messages == []  # nothing is left to align
    with written.applied():
        assert ids(model) == before
