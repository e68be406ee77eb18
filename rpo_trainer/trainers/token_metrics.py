"""Metrics of tokens under TRL's names: accuracy, entropy, mean logits, and the number of tokens seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from rpo_trainer.step.batch import PackedBatch, StepBatch
from rpo_trainer.step.token_stats import TokenStats
from rpo_trainer.trainers.metrics import MetricSums

ACCURACY, ENTROPY = "mean_token_accuracy", "entropy"
CHOSEN_LOGITS, REJECTED_LOGITS = "logits/chosen", "logits/rejected"
_FILE = "tokens.json"


def request(batch: PackedBatch, *, preferences: bool) -> None:
    """Make the forward pass of a micro-batch compute the statistics.

    Args:
        preferences: whether the mean logits are wanted too.
    """
    batch.model_inputs.stats = TokenStats(with_mean=preferences)


def names(*, preferences: bool) -> set[str]:
    """Return the names of the metrics."""
    return {ACCURACY, ENTROPY, *((CHOSEN_LOGITS, REJECTED_LOGITS) if preferences else ())}


def add_to(metrics: MetricSums, batch: PackedBatch) -> None:
    """Add the statistics of a micro-batch whose forward is done; each is a mean over trained tokens.

    The accuracy of preferences is that of the chosen responses, their entropy that of all, as in TRL.
    """
    stats = batch.model_inputs.stats
    if stats is None or stats.correct is None or stats.entropy is None:
        return
    real = batch.weights.max()  # 0 for the filler of a rank that has no example left
    first = torch.zeros_like(batch.response_tokens, dtype=torch.bool)
    for group in batch.groups:
        first.index_fill_(0, group[:, 0], True)  # assigning with an index would wait for the GPU
    chosen = first[batch.response_index] & (real > 0)
    rejected = ~first[batch.response_index] & (real > 0)
    metrics.add(ACCURACY, stats.correct, chosen)
    metrics.add(ENTROPY, stats.entropy, chosen | rejected)
    if stats.mean_logit is not None:
        metrics.add(CHOSEN_LOGITS, stats.mean_logit, chosen)
        metrics.add(REJECTED_LOGITS, stats.mean_logit, rejected)


class TokensSeen:
    """The number of tokens trained on so far, as `num_tokens`: prompts and responses, of all ranks.

    A prompt counts once for each of its responses, as if each response were a separate row.

    Args:
        reduce: sums a tensor over the ranks.
        device: where it is summed.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._reduce = reduce
        self._device = device
        self._before = 0  # a resumed run: of all ranks
        self._own = torch.zeros((), dtype=torch.long)  # on the host

    def begin(self, checkpoint: str | None) -> None:
        """Start from zero, or from the values in a checkpoint."""
        path = Path(checkpoint or "") / _FILE
        known = json.loads(path.read_text()) if checkpoint and path.is_file() else {}
        self._before, self._own = int(known.get("num_tokens", 0)), torch.zeros_like(self._own)

    def add(self, batches: Iterable[PackedBatch | StepBatch]) -> None:
        """Count the micro-batches of a step, while they are on the host."""
        for batch in batches:
            for part in batch.micro_batches:
                real = part.weights.any()  # not the filler of a rank without examples
                self._own += part.model_inputs.token_uses.sum() * real

    def total(self) -> int:
        """Return the number of tokens of all ranks; called on all of them."""
        return self._before + int(self._reduce(self._own.to(self._device)))

    def write(self, checkpoint: Path, total: int) -> None:
        """Write the total to a checkpoint, for `begin`."""
        (checkpoint / _FILE).write_text(json.dumps({"num_tokens": total}))
