"""A padding row that transformers would read as zeros is refused, or reported if training changes it."""

from __future__ import annotations

import logging

import pytest
import torch

from rpo_trainer.errors import ModelError
from rpo_trainer.trainers.setup import require_kept_padding
from tests.families import tiny_model
from tests.small_models import make_model


def test_a_row_that_is_lost_when_loaded_is_refused(tmp_path):
    model = tiny_model("youtu")
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    row = model.config.pad_token_id
    assert not torch.equal(read.get_input_embeddings().weight[row], model.lm_head.weight[row])
    with pytest.raises(ModelError):
        require_kept_padding(model)


def test_a_zero_row_is_taken_with_a_warning_where_the_tied_head_trains_it(caplog):
    model = tiny_model("youtu")
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = 0.0
    with caplog.at_level(logging.WARNING):
        require_kept_padding(model)
    assert "tied" in caplog.text
    caplog.clear()
    model.requires_grad_(False)
    require_kept_padding(model)
    assert not caplog.text


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_other_families_keep_theirs(family, caplog):
    model = make_model(family)
    model.get_input_embeddings().padding_idx = 0
    require_kept_padding(model)
    assert not caplog.text
