"""How a token is drawn: each response has random numbers of its own, one for every token.

They follow from the seed, the prompt's name and the response's number alone.
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
    """The draws of all responses.

    Args:
        names: of the random numbers of each prompt.
        count: numbers for each response.
        temperature, top_p, top_k: 1, 1 and 0 draw from the distribution as it is.
    """

    names: Sequence[str]
    seed: int
    count: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def processors(self, batch: Sequence[int], copies: int, width: int) -> list[LogitsProcessor]:
        """What shapes the logits of a batch, and at last leaves the drawn token alone.

        Args:
            batch: indices of its prompts.
            copies: responses for each prompt.
            width: tokens of the prompts, with their padding.
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
    """Uniform numbers in [0, 1), a pure function of the key."""
    return np.random.default_rng(xxhash.xxh3_128_intdigest(key.encode())).random(count)


class Draw(LogitsProcessor):
    """Leaves one token of each row possible: the one at which its number falls.

    The likeliest token of what is left is then a sample of the distribution that came in.

    Args:
        numbers: [rows, steps] in [0, 1).
        width: tokens of the prompts, with their padding.
    """

    def __init__(self, numbers: np.ndarray[Any, np.dtype[np.float64]], width: int) -> None:
        self.numbers = torch.from_numpy(numbers)
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.numbers = move(self.numbers, scores.device)  # once: the host would wait for each copy
        step = input_ids.shape[1] - self.width
        filled = widest(scores.float().softmax(-1)).cumsum(-1)  # [rows, V]
        total = filled[:, -1:]
        level = self.numbers[:, step : step + 1] * total
        level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(filled, level, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
