"""Terms of the loss of DPO and RPO, with metrics: the preference loss and the weighted SFT loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_trainer.losses import PreferenceLoss, preference_loss, sft_loss
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.trainers.config import PreferenceConfig
from rpo_trainer.trainers.early_warnings import SATURATED_GAP
from rpo_trainer.trainers.step_result import StepResult, Term


def preference_terms(
    args: PreferenceConfig, sums: Tensor, batch: PackedBatch, *, needs_rewards: bool
) -> StepResult:
    """Return the preference loss and SFT loss of each example, in the order of the groups.

    Args:
        sums: `[R]`, summed log-probs of the responses under the policy, nats.
        batch: the micro-batch, with reference log-probs.
        needs_rewards: whether the loss uses the rewards of the rows.
    """
    assert batch.reference_logps is not None  # computed before training
    policy, ref = sums, batch.reference_logps.to(sums.dtype)
    tokens = batch.response_tokens
    if args.average_logps:
        policy, ref = policy / tokens, ref / tokens
    rewards = batch.rewards if needs_rewards else None
    results = [
        preference_loss(
            policy[group],
            ref[group],
            loss_type=args.loss_type,
            beta=args.beta,
            rewards=None if rewards is None else rewards[group],
            reward_scale=getattr(args, "reward_scale", 1.0),
            label_smoothing=getattr(args, "label_smoothing", 0.0),
        )
        for group in batch.groups
    ]
    chosen = torch.cat([group[:, 0] for group in batch.groups])
    nll, _ = sft_loss(-sums[chosen], tokens[chosen], args.sft_reduction)  # type: ignore[arg-type]
    return StepResult(
        terms={
            "preference": Term(torch.cat([result.losses for result in results]), per="examples"),
            "sft": Term(
                nll,
                per="tokens" if args.sft_reduction == "token_mean" else "examples",
                coefficient=args.sft_loss_weight,
            ),
        },
        metrics=_metrics(results, sums.detach(), batch),
    )


def _metrics(results: list[PreferenceLoss], sums: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """Return the metrics of each example, mostly under TRL's names; for K > 2 "rejected" is a mean."""
    groups = batch.groups
    assert batch.reference_logps is not None
    deltas = sums - batch.reference_logps

    def others(values: list[Tensor]) -> Tensor:
        return torch.cat([v[:, 1:].mean(-1) for v in values])

    implicit = [result.implicit_rewards for result in results]
    chosen = torch.cat([v[:, 0] for v in implicit])
    gap = torch.cat([result.implicit_gap for result in results])
    chosen_delta = torch.cat([deltas[g[:, 0]] for g in groups])
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": others(implicit),
        "rewards/margins": gap,
        "rewards/accuracies": torch.cat(
            [(v[:, :1] > v[:, 1:]).to(v.dtype).mean(-1) for v in implicit]
        ),
        "logps/chosen": torch.cat([sums[g[:, 0]] for g in groups]),
        "logps/rejected": others([sums[g] for g in groups]),
        "logps/chosen_delta": chosen_delta,
        "logps/rejected_delta": others([deltas[g] for g in groups]),
        "logps/chosen_falling": (chosen_delta < 0).to(sums.dtype),
    }
    if results[0].target_gap is not None:
        target = torch.cat(
            [result.target_gap for result in results if result.target_gap is not None]
        )
        metrics["rewards/target_gap"] = target
        metrics["rewards/gap_error"] = (gap - target).abs()
        metrics["rewards/target_saturated"] = (target.abs() > SATURATED_GAP).to(target.dtype)
    return metrics
