"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while a model is fine-tuned.

Noise of a token: U(−1, 1) · α / √(L·H), L the length of its example and H the hidden size. transformers takes
the length of the whole row for L, which is many examples where rows are packed.

Shapes: `T` tokens of a packed row, `R` rows of length `L` when padded, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.step.batch import ModelInputs


def example_lengths(inputs: ModelInputs) -> Tensor:
    """Length of the example that each position belongs to, `[1, T]` or `[R, L]`; rows have one response."""
    ids = inputs.input_ids
    if inputs.plan is None:
        assert inputs.attention_mask is not None
        return inputs.attention_mask.sum(-1, keepdim=True).expand(ids.shape)
    counts = torch.tensor([s.stop - s.start for s in inputs.plan.segments])
    counts = counts.to(ids.device, non_blocking=True)
    # With the size given, the host does not wait for the device.
    return counts.repeat_interleave(counts, output_size=ids.shape[1])[None]


class Noise:
    """Adds the noise to the output of an embedding while its module trains.

    Args:
        alpha: α of the paper; 5, 10 and 15 are its values.

    Attributes:
        lengths: of the rows of the next forward, see `example_lengths`.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: Tensor | None = None

    @contextmanager
    def on(self, embeddings: nn.Module) -> Iterator[None]:
        """The noise is added while it is entered."""
        handle = embeddings.register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training or self.lengths is None:
            return output
        size = (
            self.alpha / (self.lengths * output.shape[-1]).float().sqrt()
        )  # too large for float16
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * size[..., None].to(output.dtype)
