"""Checks of a model before its weights are read: its context length, and whose tokens it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError, RunError
from rpo_trainer.models.preload_checks import check_context, check_same_tokenizer
from rpo_trainer.models.saved_files import check_savable
from tests.raising import raises


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 64),
        ({"model_type": "gpt2", "n_positions": 32}, 32),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 256),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                },
            },
            512,
        ),
    ],
    ids=["llama", "gpt2", "linear rope", "llama3 rope"],
)  # fmt: skip
def test_max_length_beyond_the_context(settings: dict[str, Any], limit: int) -> None:
    from transformers import AutoConfig

    named = {"model_type": "llama", "max_position_embeddings": 64, **settings}
    if named["model_type"] == "gpt2":
        del named["max_position_embeddings"]
    config = AutoConfig.for_model(**named)
    check_context(config, limit, "here")
    where = "stages.dpo.max_length"
    with raises(
        "model.context-exceeded", ModelError, where=where, exit_code=2, limit=limit
    ) as error:
        check_context(config, limit + 1, where)
    assert str(limit + 1) in error.value.what and f"max_length: {limit}" in str(error.value.fix)


def test_another_tokenizer_of_the_same_size(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    check_same_tokenizer(tokenizer, tmp_path, "here")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    first, other, own = (
        ("a", b, a) if list(vocabulary).index("a") < list(vocabulary).index("b") else ("b", a, b)
    )
    with raises(
        "tokenizer.mismatch", ModelError, where="here", token=first, ids=(other, own)
    ) as error:
        check_same_tokenizer(tokenizer, tmp_path, "here")
    assert all(str(part) in error.value.what for part in (repr(first), other, own))
    assert "model.tokenizer" in str(error.value.fix)
    assert error.value.exit_code == 2


def test_further_tokens_are_no_other_tokenizer(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    check_same_tokenizer(tokenizer, tmp_path, "here")
    (tmp_path / "tokenizer.json").unlink()
    check_same_tokenizer(tokenizer, tmp_path, "here")  # nothing to compare with


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {}}'])
def test_a_tokenizer_that_cannot_be_compared(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    check_same_tokenizer(character_tokenizer(), tmp_path, "here")


def test_an_output_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    check_savable({"none": None}, tmp_path)
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "below"
    with raises("run.unusable-directory", RunError, where=str(place)) as error:
        check_savable({}, place)
    assert "Not a directory" in error.value.what
