"""Token sampling: each response has its own random numbers, one for every token.

They depend only on the seed, the prompt's name and the number of the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rpo_trainer.runtime.devices import move, widest


@dataclass(frozen=True)
class Drawing:
    """The random numbers and the sampling settings of all responses.

    Args:
        names: name of each prompt, which determines its random numbers.
        seed: seed of the random numbers.
        count: random numbers per response.
        temperature, top_p, top_k: 1, 1 and 0 sample from the unchanged distribution.
    """

    names: Sequence[str]
    seed: int
    count: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def processors(self, batch: Sequence[int], copies: int, width: int) -> list[LogitsProcessor]:
        """Return the logits processors of a batch; the last one masks all but the drawn token.

        Args:
            batch: indices of its prompts.
            copies: responses per prompt.
            width: length of the prompts in tokens, padding included.
        """
        found: list[Any] = []
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        numbers = [
            _numbers(f"{self.seed}:{self.names[index]}:{copy}", self.count)
            for index in batch
            for copy in range(copies)
        ]
        return [*found, Draw(np.stack(numbers), width)]


def _numbers(key: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return uniform numbers in [0, 1), a pure function of the key."""
    return np.random.default_rng(xxhash.xxh3_128_intdigest(key.encode())).random(count)


class Draw(LogitsProcessor):
    """Mask all tokens of each row but the one that its random number selects (inverse transform sampling).

    Greedy decoding after this processor samples from the distribution before it.

    Args:
        numbers: [rows, steps] in [0, 1).
        width: length of the prompts in tokens, padding included.
    """

    def __init__(self, numbers: np.ndarray[Any, np.dtype[np.float64]], width: int) -> None:
        self.numbers = torch.from_numpy(numbers)
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.numbers = move(self.numbers, scores.device)  # once: each copy blocks the host
        step = input_ids.shape[1] - self.width
        filled = widest(scores.float().softmax(-1)).cumsum(-1)  # [rows, V]
        total = filled[:, -1:]
        level = self.numbers[:, step : step + 1] * total
        level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(filled, level, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
