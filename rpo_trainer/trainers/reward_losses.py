"""Losses of reward models, as functions of scores.

Shapes: `B` examples, `A` attributes (outputs of the head), `R` responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Return −log σ(r_c − r_r − margin) of each pair.

    Negative log-likelihood of the Bradley-Terry model, as in arXiv 2203.02155, with the margin of arXiv
    2307.09288, section 3.2.2.

    Args:
        chosen: `[B]`, rewards of the chosen responses.
        rejected: `[B]`, rewards of the rejected responses.
        margin: `[B]`, in units of the reward; None: 0.

    Returns:
        `[B]`, nats.

    Raises:
        ValueError: the shapes differ.
    """
    for name, tensor in (("rejected", rejected), ("margin", margin)):
        if tensor is not None and tensor.shape != chosen.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, chosen {list(chosen.shape)}")
    gap = chosen - rejected
    if margin is not None:
        gap = gap - margin.to(gap)
    # Above the threshold softplus is linear up to the resolution of the dtype.
    return F.softplus(-gap, threshold=40.0 if gap.dtype == torch.float64 else 20.0)


def regression_losses(scores: Tensor, ratings: Tensor) -> Tensor:
    """Return the squared errors of the attributes, 0 for missing ratings (NaN).

    Their sum divided by the number of ratings of the batch is the masked mean squared error of the reward
    models of HelpSteer2 (arXiv 2406.08673, section 3).

    Args:
        scores: `[R, A]`.
        ratings: `[R, A]`, NaN for missing ratings.

    Returns:
        `[R, A]`; an entry without a rating has no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if scores.shape != ratings.shape:
        raise ValueError(f"ratings are {list(ratings.shape)}, scores {list(scores.shape)}")
    rated = ~ratings.isnan()
    # A mask as a factor would not do: 0 · NaN is NaN.
    target = torch.where(rated, ratings.to(scores), scores.detach())
    return (scores - target).square()
