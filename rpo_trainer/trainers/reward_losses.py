"""Losses of reward models: pure functions of scores.

Shapes: `B` examples, `A` attributes (heads of the model), `R` responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """−log σ(r_c − r_r − margin) of each pair.

    Bradley and Terry's likelihood of a preference, as used for rewards since arXiv 2203.02155; the
    margin asks for a gap of that size (arXiv 2307.09288, section 3.2.2).

    Args:
        chosen: `[B]`, rewards of the better responses.
        rejected: `[B]`, rewards of the others.
        margin: `[B]`, in units of the reward; None: 0.

    Returns:
        `[B]`, nats.

    Raises:
        ValueError: shapes that do not agree.
    """
    for name, tensor in (("rejected", rejected), ("margin", margin)):
        if tensor is not None and tensor.shape != chosen.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, chosen {list(chosen.shape)}")
    gap = chosen - rejected
    if margin is not None:
        gap = gap - margin.to(gap)
    # Above the threshold softplus is linear; log1p is then below the resolution of the dtype.
    return F.softplus(-gap, threshold=40.0 if gap.dtype == torch.float64 else 20.0)


def regression_losses(scores: Tensor, ratings: Tensor) -> Tensor:
    """Squared errors of the attributes, 0 where an attribute was not rated (NaN).

    Divided by the number of ratings of the batch, their sum is the masked mean squared error with
    which HelpSteer2's reward models are trained (arXiv 2406.08673, section 3).

    Args:
        scores: `[R, A]`.
        ratings: `[R, A]`, NaN where there is none.

    Returns:
        `[R, A]`; an entry without a rating has no gradient.

    Raises:
        ValueError: shapes that do not agree.
    """
    if scores.shape != ratings.shape:
        raise ValueError(f"ratings are {list(ratings.shape)}, scores {list(scores.shape)}")
    rated = ~ratings.isnan()
    # Not multiplied by a mask: 0 · NaN is NaN.
    target = torch.where(rated, ratings.to(scores), scores.detach())
    return (scores - target).square()
