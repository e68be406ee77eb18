"""Preference losses on per-response log-probabilities: pure functions of tensors, collected in a table.

Shapes: `B` examples, `K` responses to one prompt, the chosen (best) response first.

"RPO" is Reward-aware Preference Optimization (Nemotron-4 340B technical report, section 3.3.2;
"Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
arXiv 2502.00203). It compares two gaps:

    implicit reward gap  a = β · [log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x)]   (of the policy)
    target gap           b = η · [r(x, y_c) − r(x, y_r)]                                   (of the rewards)

`rpo_bwd_kl` is the report's D[a‖b], KL(Bernoulli(σ(b)) ‖ Bernoulli(σ(a))). This direction (target first) is
usually called the *forward* KL; the name follows NeMo.

`LOSSES` contains everything that the configs, the recipe schema, the trainers and the step-0 check need about
a loss. To add a loss, add an entry. Recipes are validated without torch, so this module imports it inside
functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

SFTReduction = Literal["sum", "token_mean", "sequence_mean"]

# Replaces infinite rewards: far beyond the saturation of a sigmoid, with a finite square in float32.
_INFINITE_REWARD = 1.0e6


@dataclass(frozen=True)
class LossInputs:
    """Arguments of a loss.

    Attributes:
        log_ratios: `[B, K]`, log π − log π_ref of each response, in nats; with `average_logps`, divided by
            its number of tokens. 0 at step 0.
        implicit: `[B, K]`, implicit rewards, β · log_ratios.
        scaled_rewards: `[B, K]`, η · rewards, with infinite values replaced by ±1e6; None for losses of kind
            dpo.
        beta: β.
        label_smoothing: assumed fraction of wrong labels; 0 for losses without label smoothing.
    """

    log_ratios: Tensor
    implicit: Tensor
    scaled_rewards: Tensor | None
    beta: float
    label_smoothing: float

    @property
    def target(self) -> Tensor:
        """`scaled_rewards` of a loss with rewards.

        Raises:
            ValueError: the loss is of kind dpo, which has no rewards.
        """
        if self.scaled_rewards is None:
            raise ValueError("losses of kind dpo have no rewards: set kind='rpo'")
        return self.scaled_rewards


@dataclass(frozen=True)
class Loss:
    """One preference loss: an entry of `LOSSES`.

    Attributes:
        description: one line of plain text, shown in the help of `loss_type`.
        kind: `dpo` (`DPOTrainer` and stages of kind dpo, without rewards) or `rpo` (`RPOTrainer` and stages
            of kind rpo, with rewards and `reward_scale`).
        losses: loss of each example, `[B]`, with gradient.
        step_zero: closed form of `losses` if policy = reference model, `[B]` or a number. Its inputs are
            float64, with log-ratios of 0.
        pairs_only: only K = 2 responses are supported; otherwise any K ≥ 2.
        label_smoothing: `label_smoothing` is supported (kind dpo).
        saturates: the target enters through a sigmoid or softmax, so that a large target gap is equivalent to
            a label; enables the early warning `targets_saturated` (kind rpo).

    Raises:
        ValueError: unknown kind, or a setting of the other kind.
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
            raise ValueError("label_smoothing requires kind dpo: RPOConfig does not have it")
        if self.saturates and self.kind != "rpo":
            raise ValueError("saturates requires kind rpo: losses of kind dpo have no target")

    @property
    def needs_rewards(self) -> bool:
        """Whether every response must have a reward."""
        return self.kind == "rpo"


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss of each example, and the detached quantities for logging.

    Attributes:
        losses: `[B]`, with gradient.
        implicit_rewards: `[B, K]`, β · (log π − log π_ref), detached.
        implicit_gap: `[B]`, implicit reward of the first response minus the mean of the others, detached.
        target_gap: `[B]`, the same for η · rewards, detached; None for losses without rewards.
    """

    losses: Tensor
    implicit_rewards: Tensor
    implicit_gap: Tensor
    target_gap: Tensor | None


def _dpo(x: LossInputs) -> Tensor:
    """Return −(1 − ε) log σ(a) − ε log σ(−a)."""
    gap, smoothing = _gap(x.implicit), x.label_smoothing
    if smoothing == 0.0:
        return _softplus(-gap)
    return (1.0 - smoothing) * _softplus(-gap) + smoothing * _softplus(gap)


def _sqloo(x: LossInputs) -> Tensor:
    error = _leave_one_out(x.implicit) - _leave_one_out(x.target)
    return 0.5 * error.square().sum(dim=-1)


def _bwd_kl_step_zero(x: LossInputs) -> Tensor:
    """Return ln K − H(softmax(η·rewards))."""
    import torch

    entropy: Tensor = torch.special.entr(x.target.softmax(-1)).sum(-1)
    return math.log(x.target.shape[1]) - entropy


def _fwd_kl_step_zero(x: LossInputs) -> Tensor:
    """Return logsumexp(η·rewards) − ln K − mean(η·rewards); for pairs ln cosh(target gap / 2)."""
    return x.target.logsumexp(-1) - math.log(x.target.shape[1]) - x.target.mean(-1)


# `step_zero` checks `losses`, so it is an independent formula, not derived from `losses`.
LOSSES: dict[str, Loss] = {
    "dpo": Loss(
        "−log σ of the implicit reward gap (arXiv 2305.18290 eq. 7; cDPO with label_smoothing)",
        kind="dpo",
        losses=_dpo,
        step_zero=lambda x: math.log(2.0),
        pairs_only=True,
        label_smoothing=True,
    ),
    "ipo": Loss(
        "squared difference of the log-ratio gap and 1/(2β) (arXiv 2310.12036 eq. 17)",
        kind="dpo",
        losses=lambda x: (_gap(x.log_ratios) - 1.0 / (2.0 * x.beta)).square(),
        step_zero=lambda x: 1.0 / (4.0 * x.beta * x.beta),
        pairs_only=True,
    ),
    "rpo_bwd_kl": Loss(
        "KL(softmax of η·rewards ‖ softmax of implicit rewards), as in the Nemotron-4 report",
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
        "squared difference of the implicit reward gap and the target gap",
        kind="rpo",
        losses=lambda x: (_gap(x.implicit) - _gap(x.target)).square(),
        step_zero=lambda x: _gap(x.target).square(),
        pairs_only=True,
    ),
    "rpo_sqloo": Loss(
        "½ Σ of rpo_sq of each response against the mean of the others; equal to rpo_sq for pairs",
        kind="rpo",
        losses=_sqloo,
        step_zero=lambda x: 0.5 * _leave_one_out(x.target).square().sum(-1),
    ),
}


def losses_of(kind: str) -> tuple[str, ...]:
    """Return the names of the losses of a kind, in the order of the table."""
    return tuple(name for name, loss in LOSSES.items() if loss.kind == kind)


def more_than_pairs() -> tuple[str, ...]:
    """Return the names of the losses that support more than two responses."""
    return tuple(name for name, loss in LOSSES.items() if not loss.pairs_only)


def smoothed() -> str:
    """Return the names of the losses that support `label_smoothing`, as text."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.label_smoothing)


def find_loss(name: object) -> Loss | None:
    """Return the loss of that name; None for any other value."""
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
    """Compute the loss of each example from the log-probs of its responses.

    Args:
        policy_logps: `[B, K]`, Σ log π(token) over each response, in nats; chosen or best response first.
        reference_logps: `[B, K]`, the same under the reference model.
        loss_type: a name in `LOSSES`.
        beta: β, scale of the implicit rewards.
        rewards: `[B, K]`, required by losses of kind rpo. Infinite values count as ±1e6 after scaling.
        reward_scale: η.
        label_smoothing: assumed fraction of pairs with a wrong label (`dpo` only).

    Returns:
        `PreferenceLoss`, computed in float32, or in float64 for float64 log-probs.

    Raises:
        ValueError: shapes do not match, the loss is unknown, rewards are missing, K ≠ 2 for a loss that only
            supports pairs, label smoothing is not supported, or the loss does not return `[B]`.
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
    """Compute the closed form of each example's loss if policy = reference model.

    Args:
        shape: (B, K), required without rewards.
        rewards: `[B, K]`, required by losses of kind rpo.

    Returns:
        `[B]`, float64, on the device of the rewards.

    Raises:
        ValueError: rewards or shape are missing, or the closed form returns neither `[B]` nor a number.
    """
    import torch

    loss = LOSSES[loss_type]
    if rewards is None and (loss.needs_rewards or shape is None):
        raise ValueError(f"{loss_type} requires {'rewards' if loss.needs_rewards else 'shape'}")
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
    """Compute numerators and weights of the SFT term on the chosen responses.

    The term is `numerators.sum() / weights.sum()`, both summed over the global batch.

    Args:
        nll: `[B]`, −log π of each chosen response, summed over its tokens.
        tokens: `[B]`, number of trained tokens of each chosen response.
        reduction: `sum` (sum over tokens, mean over examples; the weights of 1e-5 to 1e-3 in the Nemotron-4
            report are for this reduction), `token_mean` (mean over all tokens of the global batch),
            `sequence_mean` (mean over the tokens of each response, then over examples).

    Returns:
        Numerators `[B]` with gradient, and weights `[B]`.
    """
    if reduction == "sum":
        return nll, nll.new_ones(nll.shape)
    if reduction == "token_mean":
        return nll, tokens.to(nll.dtype)
    if reduction == "sequence_mean":
        return nll / tokens.to(nll.dtype), nll.new_ones(nll.shape)
    raise ValueError(f"unknown sft_reduction {reduction!r}: sum, token_mean or sequence_mean")


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(softmax(first) ‖ softmax(second)) over the K responses, `[B]`; Bernoulli if K = 2."""
    import torch

    if first.shape[-1] == 2:
        # The softmax of two values depends on their gap alone; softplus keeps tails that logsumexp rounds.
        a, b = _gap(first), _gap(second)
        first, second = torch.stack([a, -a], -1), torch.stack([b, -b], -1)
        log_p, log_q = -_softplus(-first), -_softplus(-second)
    else:
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), linear only if log1p(exp(−x)) is below the resolution of the dtype."""
    import torch

    threshold = 40.0 if x.dtype == torch.float64 else 20.0
    return torch.nn.functional.softplus(x, threshold=threshold)


def _gap(x: Tensor) -> Tensor:
    """Return the first response minus the mean of the others, `[B, K] → [B]`."""
    return x[:, 0] - (x[:, 1] if x.shape[1] == 2 else x[:, 1:].mean(dim=-1))


def _leave_one_out(x: Tensor) -> Tensor:
    """Return each response minus the mean of the others, `[B, K] → [B, K]`."""
    k = x.shape[-1]
    return (x - x.mean(dim=-1, keepdim=True)) * (k / (k - 1))


def _checked(
    policy_logps: Tensor,
    reference_logps: Tensor,
    loss_type: str,
    rewards: Tensor | None,
    label_smoothing: float,
) -> Loss:
    """Return the loss of that name after checking the arguments."""
    loss = find_loss(loss_type)
    if loss is None:
        raise ValueError(f"unknown loss_type {loss_type!r}; use one of: {', '.join(LOSSES)}")
    shape = tuple(policy_logps.shape)
    if policy_logps.dim() != 2 or shape[1] < 2:
        raise ValueError(f"policy_logps must be [B, K] with K ≥ 2, got {list(shape)}")
    for name, tensor in (("reference_logps", reference_logps), ("rewards", rewards)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, policy_logps {list(shape)}")
    if loss.pairs_only and shape[1] != 2:
        raise ValueError(f"{loss_type} requires pairs (K = 2), got K = {shape[1]}")
    if loss.needs_rewards and rewards is None:
        raise ValueError(f"{loss_type} requires rewards [B, K]")
    if label_smoothing and not loss.label_smoothing:
        raise ValueError(f"label_smoothing is supported by {smoothed()}, not by {loss_type}")
    return loss


def _check_result(losses: Tensor, examples: int, what: str) -> None:
    if tuple(losses.shape) != (examples,):
        raise ValueError(f"{what} must be [B] = [{examples}], got {list(losses.shape)}")
