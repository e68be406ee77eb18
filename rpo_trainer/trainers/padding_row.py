"""The embedding of the padding token, which a few classes of transformers set to zero whenever they load."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from rpo_trainer.errors import ModelError
from rpo_trainer.models.sharding import whole_on_every_rank
from rpo_trainer.runtime.distributed import is_main

logger = logging.getLogger(__name__)


def require_kept_padding(model: Any) -> None:
    """Checks that the model, once saved, is read with the embedding of its padding token.

    A head tied to the embeddings trains that row too: then a WARNING says that it is read as zeros.

    Raises:
        ModelError: the row is not zero, and transformers would set it to zero.
    """
    embedding = model.get_input_embeddings()
    place = getattr(embedding, "padding_idx", None)
    if place is None or not whole_on_every_rank(model) or not _zeroed_when_loaded(model, place):
        return
    name = type(model).__name__
    if embedding.weight[place].any():
        raise ModelError(
            f"transformers sets the embedding of token {place} to zero whenever it loads a {name}, and this "
            "model's is not zero",
            why="the saved model would be read as another one",
            fix=f"zero that row of the embeddings, or set padding_idx of the {type(embedding).__name__} "
            "and pad_token_id of the config to None",
        )
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    if tied and embedding.weight.requires_grad and is_main():
        logger.warning(
            "transformers sets the embedding of token %d to zero whenever it loads a %s: what training "
            "changes of it, through the head that is tied to it, is lost where the output is loaded",
            place, name,
        )  # fmt: skip


def _zeroed_when_loaded(model: Any, place: int) -> bool:
    """Whether the class initializes the row of an embedding that is marked as loaded."""
    if model.is_remote_code():
        return False  # transformers leaves what it has loaded of these alone
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        trial = nn.Embedding(place + 1, 1, padding_idx=place)
        trial.weight.fill_(1.0)
        trial.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(trial)
        return not bool(trial.weight[place].any())
