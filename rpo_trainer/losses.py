"""Preference losses on per-response log-probabilities: pure functions of tensors.

Shapes: `B` examples, `K` responses of one prompt, the chosen (best) response first.

Names. "RPO" is Reward-aware Preference Optimization (Nemotron-4 340B technical report, section 3.3.2;
"Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
arXiv 2502.00203). Two gaps meet in it:

    implicit gap  a = β · [log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x)]     (the policy's)
    target gap    b = η · [r(x, y_c) − r(x, y_r)]                                     (the reward model's)

`rpo_bwd_kl` is the report's D[a‖b]: KL(Bernoulli(σ(b)) ‖ Bernoulli(σ(a))). Most texts on machine
learning call that direction (target first) the *forward* KL; the name here is NeMo's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["dpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "rpo_sqloo"]
SFTReduction = Literal["sum", "token_mean", "sequence_mean"]

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
REWARD_LOSSES = frozenset(name for name in LOSS_TYPES if name.startswith("rpo_"))
PAIR_ONLY_LOSSES = frozenset({"dpo", "ipo", "rpo_sq"})

# What an infinite reward counts as: far beyond where a sigmoid saturates, and still exact enough
# in float32 that its square is finite.
_INFINITE_REWARD = 1.0e6


@dataclass(frozen=True)
class PreferenceLoss:
    """Per-example losses and, detached, what they were made of.

    Attributes:
        losses: `[B]`, with gradient.
        implicit_rewards: `[B, K]`, β · (log π − log π_ref), detached.
        implicit_gap: `[B]`, the first response's implicit reward minus the mean of the others', detached.
        target_gap: `[B]`, the same of η · rewards, detached; None for losses without rewards.
    """

    losses: Tensor
    implicit_rewards: Tensor
    implicit_gap: Tensor
    target_gap: Tensor | None


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    loss_type: LossType,
    beta: float,
    rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Loss of each example from the log-probabilities of its responses.

    Args:
        policy_logps: `[B, K]`, Σ log π(token) over each response, nats; chosen or best first.
        reference_logps: `[B, K]`, the same under the reference.
        loss_type: `dpo` (arXiv 2305.18290 eq. 7; with label smoothing cDPO), `ipo` (arXiv 2310.12036
            eq. 17), `rpo_bwd_kl`, `rpo_fwd_kl` (K = 2: Bernoulli; K > 2: categorical over the K
            responses), `rpo_sq` (squared distance of the gaps), `rpo_sqloo` (each response against the
            mean of the others, ½ Σ_k of the squared distances; at K = 2 equal to `rpo_sq`).
        beta: β, the strength of the implicit reward.
        rewards: `[B, K]`, given rewards; needed by the `rpo_*` losses. An infinite reward counts as
            ±1e6 after scaling.
        reward_scale: η.
        label_smoothing: share of pairs whose label is taken to be wrong (`dpo` only).

    Returns:
        `PreferenceLoss`; computed in float32, or in float64 where the log-probabilities are.

    Raises:
        ValueError: shapes that do not agree, an unknown loss, missing rewards, K ≠ 2 for a loss of
            pairs, label smoothing for a loss that has none.
    """
    _check(policy_logps, reference_logps, loss_type, rewards, label_smoothing)
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    log_ratios = policy_logps.to(dtype) - reference_logps.to(dtype)
    implicit = beta * log_ratios
    target = None
    if rewards is not None:
        scaled = reward_scale * rewards.to(device=implicit.device, dtype=dtype)
        target = scaled.nan_to_num(
            nan=float("nan"), posinf=_INFINITE_REWARD, neginf=-_INFINITE_REWARD
        )

    if loss_type == "dpo":
        losses = _dpo(_gap(implicit), label_smoothing)
    elif loss_type == "ipo":
        losses = (_gap(log_ratios) - 1.0 / (2.0 * beta)).square()
    else:
        assert target is not None  # _check
        if loss_type == "rpo_bwd_kl":
            losses = _kl(target, implicit)
        elif loss_type == "rpo_fwd_kl":
            losses = _kl(implicit, target)
        elif loss_type == "rpo_sq":
            losses = (_gap(implicit) - _gap(target)).square()
        else:
            error = _leave_one_out(implicit) - _leave_one_out(target)
            losses = 0.5 * error.square().sum(dim=-1)

    return PreferenceLoss(
        losses=losses,
        implicit_rewards=implicit.detach(),
        implicit_gap=_gap(implicit.detach()),
        target_gap=_gap(target.detach())
        if loss_type in REWARD_LOSSES and target is not None
        else None,
    )


def step_zero_losses(
    loss_type: LossType,
    *,
    beta: float,
    rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    batch_size: int | None = None,
) -> Tensor:
    """What each example's loss is when policy = reference, in closed form: a constant of the data.

    `dpo` (any smoothing): ln 2. `ipo`: 1/(4β²). `rpo_bwd_kl`: ln K − H(softmax(η·rewards)).
    `rpo_fwd_kl`: logsumexp(η·rewards) − ln K − mean(η·rewards), for pairs ln cosh(target gap / 2).
    `rpo_sq`: target gap². `rpo_sqloo`: half the sum of the squared leave-one-out targets.

    Args:
        rewards: `[B, K]`; without them `batch_size` says how many examples there are.

    Returns:
        `[B]`, float64.
    """
    if rewards is None:
        if loss_type in REWARD_LOSSES or batch_size is None:
            raise ValueError(f"{loss_type} needs rewards, other losses batch_size")
        constant = math.log(2.0) if loss_type == "dpo" else 1.0 / (4.0 * beta * beta)
        return torch.full((batch_size,), constant, dtype=torch.float64)
    if loss_type not in REWARD_LOSSES:
        return step_zero_losses(loss_type, beta=beta, batch_size=rewards.shape[0]).to(
            rewards.device
        )
    target = (reward_scale * rewards.double()).clamp(-_INFINITE_REWARD, _INFINITE_REWARD)
    log_k = math.log(rewards.shape[1])
    if loss_type == "rpo_bwd_kl":
        entropy: Tensor = torch.special.entr(target.softmax(-1)).sum(-1)
        return log_k - entropy
    if loss_type == "rpo_fwd_kl":
        return target.logsumexp(-1) - log_k - target.mean(-1)
    if loss_type == "rpo_sq":
        return _gap(target).square()
    return 0.5 * _leave_one_out(target).square().sum(-1)


def sft_loss(nll: Tensor, tokens: Tensor, reduction: SFTReduction) -> tuple[Tensor, Tensor]:
    """Numerators and weights of the SFT term on the chosen responses.

    The term is `numerators.sum() / weights.sum()`, both summed over the whole global batch.

    Args:
        nll: `[B]`, −log π of each chosen response, summed over its tokens.
        tokens: `[B]`, number of trained tokens of each.
        reduction: `sum` (Σ over tokens, mean over examples: what the report's weights of 1e-5 to 1e-3
            are made for), `token_mean` (over all tokens of the global batch), `sequence_mean` (mean
            over each response's tokens, then over examples).

    Returns:
        Numerators `[B]` with gradient, weights `[B]`.
    """
    if reduction == "sum":
        return nll, torch.ones_like(nll)
    if reduction == "token_mean":
        return nll, tokens.to(nll.dtype)
    if reduction == "sequence_mean":
        return nll / tokens.to(nll.dtype), torch.ones_like(nll)
    raise ValueError(f"unknown sft_reduction {reduction!r}: sum, token_mean or sequence_mean")


def _dpo(gap: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(a) − ε log σ(−a)."""
    if label_smoothing == 0.0:
        return F.softplus(-gap, threshold=_never(gap))
    return (1.0 - label_smoothing) * F.softplus(
        -gap, threshold=_never(gap)
    ) + label_smoothing * F.softplus(gap, threshold=_never(gap))


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) ‖ softmax(second)) over the K responses, `[B]`; Bernoulli where K = 2."""
    if first.shape[-1] == 2:
        # Two-way softmax by the gap alone: softplus keeps the tails that logsumexp would round away.
        a, b = _gap(first), _gap(second)
        first, second = torch.stack([a, -a], -1), torch.stack([b, -b], -1)
        log_p = -F.softplus(-first, threshold=_never(first))
        log_q = -F.softplus(-second, threshold=_never(second))
    else:
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _never(x: Tensor) -> float:
    """A softplus threshold at which log1p(exp(−x)) is below the resolution of the dtype."""
    return 40.0 if x.dtype == torch.float64 else 20.0


def _gap(x: Tensor) -> Tensor:
    """First response against the mean of the others, `[B, K] → [B]`."""
    return x[:, 0] - (x[:, 1] if x.shape[1] == 2 else x[:, 1:].mean(dim=-1))


def _leave_one_out(x: Tensor) -> Tensor:
    """Each response minus the mean of the others, `[B, K] → [B, K]`."""
    k = x.shape[-1]
    return (x - x.mean(dim=-1, keepdim=True)) * (k / (k - 1))


def _check(
    policy_logps: Tensor,
    reference_logps: Tensor,
    loss_type: str,
    rewards: Tensor | None,
    label_smoothing: float,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")
    shape = tuple(policy_logps.shape)
    if policy_logps.dim() != 2 or shape[1] < 2:
        raise ValueError(f"policy_logps must be [B, K] with K of 2 or more, got {list(shape)}")
    for name, tensor in (("reference_logps", reference_logps), ("rewards", rewards)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, policy_logps {list(shape)}")
    if loss_type in PAIR_ONLY_LOSSES and shape[1] != 2:
        raise ValueError(f"{loss_type} is a loss of pairs (K = 2), got K = {shape[1]}")
    if loss_type in REWARD_LOSSES and rewards is None:
        raise ValueError(f"{loss_type} matches the rewards' gap and needs rewards [B, K]")
    if label_smoothing and loss_type != "dpo":
        raise ValueError(f"label_smoothing belongs to dpo, not to {loss_type}")
