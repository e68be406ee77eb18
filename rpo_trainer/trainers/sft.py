"""Supervised fine-tuning on assistant turns only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rpo_trainer.trainers.base import PackedTrainer, StepResult, Term
from rpo_trainer.trainers.config import SFTConfig


class SFTTrainer(PackedTrainer):
    """−log π of the trained tokens, averaged over all of them in the global batch.

    Rows: `messages`, or `prompt` and `response` (or `completion`), or tokenised already. Every assistant
    turn is trained, its end token included, and nothing else.

    Args:
        model: a causal language model, or a name or path to load one from.
        args: an `SFTConfig`.
        train_dataset: a `datasets.Dataset` or a list of rows.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; None: the one the model was loaded with.
        peft_config: trains an adapter in place of the weights.
        callbacks: `transformers.TrainerCallback`s.
        optimizers: (optimizer, scheduler) in place of those of `args`.
    """

    config_class = SFTConfig
    row_kind = "sft"

    def losses(self, sums: Tensor, batch: dict[str, Any]) -> StepResult:
        """The negative log-likelihood of each example, per trained token of the global batch."""
        return StepResult(terms={"sft": Term(-sums, per="tokens")}, metrics={})
