"""Preference losses on per-response log-probabilities: pure functions of tensors, in one table.

Shapes: `B` examples, `K` responses of one prompt, the chosen (best) response first.

Names. "RPO" is Reward-aware Preference Optimization (Nemotron-4 340B technical report, section 3.3.2;
"Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
arXiv 2502.00203). Two gaps meet in it:

    implicit gap  a = β · [log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x)]     (the policy's)
    target gap    b = η · [r(x, y_c) − r(x, y_r)]                                     (the reward model's)

`rpo_bwd_kl` is the report's D[a‖b]: KL(Bernoulli(σ(b)) ‖ Bernoulli(σ(a))). Most texts on machine
learning call that direction (target first) the *forward* KL; the name here is NeMo's.

`LOSSES` has everything that the configs, the recipe schema, the trainers and the step-0 check know
about a loss; a new loss is a new entry. Recipes are validated without torch, so this module imports
it inside the functions that call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

SFTReduction = Literal["sum", "token_mean", "sequence_mean"]

# What an infinite reward counts as: far beyond where a sigmoid saturates, and still exact enough
# in float32 that its square is finite.
_INFINITE_REWARD = 1.0e6


@dataclass(frozen=True)
class LossInputs:
    """What a loss is a function of.

    Attributes:
        log_ratios: `[B, K]`, log π − log π_ref of each response, nats; divided by its number of tokens
            with `average_logps`. 0 at step 0.
        implicit: `[B, K]`, the implicit rewards: β · log_ratios.
        scaled_rewards: `[B, K]`, η · rewards, an infinite one as ±1e6; None for losses of kind dpo.
        beta: β.
        label_smoothing: share of labels taken to be wrong; 0 for losses without it.
    """

    log_ratios: Tensor
    implicit: Tensor
    scaled_rewards: Tensor | None
    beta: float
    label_smoothing: float

    @property
    def target(self) -> Tensor:
        """`scaled_rewards` of a loss that has them.

        Raises:
            ValueError: a loss of kind dpo, which is given no rewards.
        """
        if self.scaled_rewards is None:
            raise ValueError("losses of kind dpo are given no rewards: make it one of kind rpo")
        return self.scaled_rewards


@dataclass(frozen=True)
class Loss:
    """One preference loss: an entry of `LOSSES`.

    Attributes:
        description: what it is, in a line of plain text; the help of `loss_type` shows it.
        kind: who offers it: `dpo` (`DPOTrainer` and stages of that kind; no rewards) or `rpo`
            (`RPOTrainer`; rows have rewards, and `reward_scale` acts).
        losses: the loss of each example, `[B]`, with gradient.
        step_zero: the same where policy = reference, in closed form: `[B]` or one number. Its inputs are
            in float64, with log-ratios of 0.
        pairs_only: it takes K = 2 responses alone; else any K of 2 or more.
        label_smoothing: `label_smoothing` acts (kind dpo).
        saturates: the target acts through a sigmoid or softmax, so that a large reward gap says no more than
            a label; the early warning `targets_saturated` is for these losses (kind rpo).

    Raises:
        ValueError: an unknown kind, or a setting of the other kind.
    """

    description: str
    kind: Literal["dpo", "rpo"]
    losses: Callable[[LossInputs], Tensor]
    step_zero: Callable[[LossInputs], Tensor | float]
    pairs_only: bool = False
    label_smoothing: bool = False
    saturates: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("dpo", "rpo"):
            raise ValueError(f"kind must be dpo or rpo, got {self.kind!r}")
        if self.label_smoothing and self.kind != "dpo":
            raise ValueError("label_smoothing belongs to kind dpo: RPOConfig does not have it")
        if self.saturates and self.kind != "rpo":
            raise ValueError("saturates belongs to kind rpo: losses of kind dpo have no target")

    @property
    def needs_rewards(self) -> bool:
        """Whether each response must have a reward."""
        return self.kind == "rpo"


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


def _dpo(x: LossInputs) -> Tensor:
    """−(1 − ε) log σ(a) − ε log σ(−a)."""
    gap, smoothing = _gap(x.implicit), x.label_smoothing
    if smoothing == 0.0:
        return _softplus(-gap)
    return (1.0 - smoothing) * _softplus(-gap) + smoothing * _softplus(gap)


def _sqloo(x: LossInputs) -> Tensor:
    error = _leave_one_out(x.implicit) - _leave_one_out(x.target)
    return 0.5 * error.square().sum(dim=-1)


def _bwd_kl_step_zero(x: LossInputs) -> Tensor:
    """ln K − H(softmax(η·rewards))."""
    import torch

    entropy: Tensor = torch.special.entr(x.target.softmax(-1)).sum(-1)
    return math.log(x.target.shape[1]) - entropy


def _fwd_kl_step_zero(x: LossInputs) -> Tensor:
    """logsumexp(η·rewards) − ln K − mean(η·rewards); for pairs ln cosh(target gap / 2)."""
    return x.target.logsumexp(-1) - math.log(x.target.shape[1]) - x.target.mean(-1)


# `step_zero` is what `losses` is compared with: a formula of its own, never derived from it.
LOSSES: dict[str, Loss] = {
    "dpo": Loss(
        "−log σ of the implicit gap (arXiv 2305.18290 eq. 7; with label_smoothing cDPO)",
        kind="dpo",
        losses=_dpo,
        step_zero=lambda x: math.log(2.0),
        pairs_only=True,
        label_smoothing=True,
    ),
    "ipo": Loss(
        "squared distance of the gap of the log-ratios from 1/(2β) (arXiv 2310.12036 eq. 17)",
        kind="dpo",
        losses=lambda x: (_gap(x.log_ratios) - 1.0 / (2.0 * x.beta)).square(),
        step_zero=lambda x: 1.0 / (4.0 * x.beta * x.beta),
        pairs_only=True,
    ),
    "rpo_bwd_kl": Loss(
        "KL(softmax of η·rewards ‖ softmax of implicit rewards), the report's",
        kind="rpo",
        losses=lambda x: _kl(x.target, x.implicit),
        step_zero=_bwd_kl_step_zero,
        saturates=True,
    ),
    "rpo_fwd_kl": Loss(
        "KL(softmax of implicit rewards ‖ softmax of η·rewards)",
        kind="rpo",
        losses=lambda x: _kl(x.implicit, x.target),
        step_zero=_fwd_kl_step_zero,
        saturates=True,
    ),
    "rpo_sq": Loss(
        "squared distance of the implicit gap from the target gap",
        kind="rpo",
        losses=lambda x: (_gap(x.implicit) - _gap(x.target)).square(),
        step_zero=lambda x: _gap(x.target).square(),
        pairs_only=True,
    ),
    "rpo_sqloo": Loss(
        "½ Σ of the squared distances of each response against the mean of the others; for pairs rpo_sq",
        kind="rpo",
        losses=_sqloo,
        step_zero=lambda x: 0.5 * _leave_one_out(x.target).square().sum(-1),
    ),
}


def losses_of(kind: str) -> tuple[str, ...]:
    """The names of the losses that a trainer or a stage of this kind offers, in the table's order."""
    return tuple(name for name, loss in LOSSES.items() if loss.kind == kind)


def more_than_pairs() -> tuple[str, ...]:
    """The names of the losses that take more than two responses."""
    return tuple(name for name, loss in LOSSES.items() if not loss.pairs_only)


def smoothed() -> str:
    """The names of the losses that `label_smoothing` acts on, in words."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.label_smoothing)


def find_loss(name: object) -> Loss | None:
    """The loss of that name; None where there is none, whatever `name` is."""
    return LOSSES.get(name) if isinstance(name, str) else None


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    loss_type: str,
    beta: float,
    rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Loss of each example from the log-probabilities of its responses.

    Args:
        policy_logps: `[B, K]`, Σ log π(token) over each response, nats; chosen or best first.
        reference_logps: `[B, K]`, the same under the reference.
        loss_type: a name of `LOSSES`.
        beta: β, the strength of the implicit reward.
        rewards: `[B, K]`, given rewards; needed by the losses of kind rpo. An infinite reward counts as
            ±1e6 after scaling.
        reward_scale: η.
        label_smoothing: share of pairs whose label is taken to be wrong (`dpo` only).

    Returns:
        `PreferenceLoss`; computed in float32, or in float64 where the log-probabilities are.

    Raises:
        ValueError: shapes that do not agree, an unknown loss, missing rewards, K ≠ 2 for a loss of
            pairs, label smoothing for a loss that has none, a loss that does not return `[B]`.
    """
    import torch

    loss = _checked(policy_logps, reference_logps, loss_type, rewards, label_smoothing)
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    log_ratios = policy_logps.to(dtype) - reference_logps.to(dtype)
    implicit = beta * log_ratios
    target = None
    if loss.needs_rewards:
        assert rewards is not None  # _checked
        scaled = reward_scale * rewards.to(device=implicit.device, dtype=dtype)
        target = scaled.nan_to_num(
            nan=float("nan"), posinf=_INFINITE_REWARD, neginf=-_INFINITE_REWARD
        )
    losses = loss.losses(LossInputs(log_ratios, implicit, target, beta, label_smoothing))
    _check_result(losses, len(policy_logps), f"losses of {loss_type}")
    return PreferenceLoss(
        losses=losses,
        implicit_rewards=implicit.detach(),
        implicit_gap=_gap(implicit.detach()),
        target_gap=None if target is None else _gap(target.detach()),
    )


def step_zero_losses(
    loss_type: str,
    *,
    beta: float,
    shape: tuple[int, int] | None = None,
    rewards: Tensor | None = None,
    reward_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What each example's loss is when policy = reference, in closed form: a constant of the data.

    Args:
        shape: B and K; needed where there are no rewards.
        rewards: `[B, K]`; needed by the losses of kind rpo.

    Returns:
        `[B]`, float64, on the rewards' device.

    Raises:
        ValueError: missing rewards or shape, a closed form that gives neither `[B]` nor a number.
    """
    import torch

    loss = LOSSES[loss_type]
    if rewards is None and (loss.needs_rewards or shape is None):
        raise ValueError(f"{loss_type} needs {'rewards' if loss.needs_rewards else 'the shape'}")
    zeros = (
        torch.zeros(shape, dtype=torch.float64)  # type: ignore[arg-type]
        if rewards is None
        else torch.zeros_like(rewards, dtype=torch.float64)
    )
    target = None
    if loss.needs_rewards and rewards is not None:
        target = (reward_scale * rewards.double()).clamp(-_INFINITE_REWARD, _INFINITE_REWARD)
    value = loss.step_zero(LossInputs(zeros, zeros, target, beta, label_smoothing))
    if not isinstance(value, torch.Tensor):
        return zeros.new_full((len(zeros),), value)
    _check_result(value, len(zeros), f"step_zero of {loss_type}")
    return value


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
        return nll, nll.new_ones(nll.shape)
    if reduction == "token_mean":
        return nll, tokens.to(nll.dtype)
    if reduction == "sequence_mean":
        return nll / tokens.to(nll.dtype), nll.new_ones(nll.shape)
    raise ValueError(f"unknown sft_reduction {reduction!r}: sum, token_mean or sequence_mean")


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) ‖ softmax(second)) over the K responses, `[B]`; Bernoulli where K = 2."""
    import torch

    if first.shape[-1] == 2:
        # Two-way softmax by the gap alone: softplus keeps the tails that logsumexp would round away.
        a, b = _gap(first), _gap(second)
        first, second = torch.stack([a, -a], -1), torch.stack([b, -b], -1)
        log_p, log_q = -_softplus(-first), -_softplus(-second)
    else:
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); linear only where log1p(exp(−x)) is below the resolution of the dtype."""
    import torch

    threshold = 40.0 if x.dtype == torch.float64 else 20.0
    return torch.nn.functional.softplus(x, threshold=threshold)


def _gap(x: Tensor) -> Tensor:
    """First response against the mean of the others, `[B, K] → [B]`."""
    return x[:, 0] - (x[:, 1] if x.shape[1] == 2 else x[:, 1:].mean(dim=-1))


def _leave_one_out(x: Tensor) -> Tensor:
    """Each response minus the mean of the others, `[B, K] → [B, K]`."""
    k = x.shape[-1]
    return (x - x.mean(dim=-1, keepdim=True)) * (k / (k - 1))


def _checked(
    policy_logps: Tensor,
    reference_logps: Tensor,
    loss_type: str,
    rewards: Tensor | None,
    label_smoothing: float,
) -> Loss:
    """The loss of that name, whose arguments agree."""
    loss = find_loss(loss_type)
    if loss is None:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSSES)}")
    shape = tuple(policy_logps.shape)
    if policy_logps.dim() != 2 or shape[1] < 2:
        raise ValueError(f"policy_logps must be [B, K] with K of 2 or more, got {list(shape)}")
    for name, tensor in (("reference_logps", reference_logps), ("rewards", rewards)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, policy_logps {list(shape)}")
    if loss.pairs_only and shape[1] != 2:
        raise ValueError(f"{loss_type} is a loss of pairs (K = 2), got K = {shape[1]}")
    if loss.needs_rewards and rewards is None:
        raise ValueError(f"{loss_type} matches the rewards' gap and needs rewards [B, K]")
    if label_smoothing and not loss.label_smoothing:
        raise ValueError(f"label_smoothing belongs to {smoothed()}, not to {loss_type}")
    return loss


def _check_result(losses: Tensor, examples: int, what: str) -> None:
    if tuple(losses.shape) != (examples,):
        raise ValueError(f"{what} must be [B] = [{examples}], got {list(losses.shape)}")
