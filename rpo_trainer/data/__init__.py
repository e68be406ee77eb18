"""Rows in one internal format: reading, adapting, filtering, mixing, rendering, tokenizing.

Imports neither torch nor transformers, so that a recipe's data can be checked at once.
"""

from rpo_trainer.data.audit import Audit
from rpo_trainer.data.encode import encode_prompt, end_token_ids
from rpo_trainer.data.filters import filter_rows
from rpo_trainer.data.mix import add_replay, mix_sources
from rpo_trainer.data.pipeline import load_rows, prepare_dataset
from rpo_trainer.data.ratings import hold_out, rating_targets
from rpo_trainer.data.templates import set_chat_template
from rpo_trainer.data.tokenize import tokenize_rows

__all__ = [
    "Audit",
    "add_replay",
    "encode_prompt",
    "end_token_ids",
    "filter_rows",
    "hold_out",
    "load_rows",
    "mix_sources",
    "prepare_dataset",
    "rating_targets",
    "set_chat_template",
    "tokenize_rows",
]
