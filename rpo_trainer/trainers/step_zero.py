"""The step-0 check: if policy and reference model are the same, the loss has a closed form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.errors import StepZeroError
from rpo_trainer.losses import step_zero_losses
from rpo_trainer.models.sharding import is_replicated
from rpo_trainer.runtime.devices import move, widest, widest_float
from rpo_trainer.runtime.distributed import all_gather_dict, rank
from rpo_trainer.step.batch import Layout, PackedBatch
from rpo_trainer.step.forward import token_logprobs
from rpo_trainer.step.logprobs import logprobs_from_logits, response_sums
from rpo_trainer.trainers.config import PreferenceConfig
from rpo_trainer.trainers.noise import is_deterministic, is_noisy, noise_in, text_of

logger = logging.getLogger(__name__)


class StepZero:
    """Collects the forwards of the first global batch, and checks them before the first update.

    The check compares log-probs per token of policy and reference: the loss is a function of them, and one
    tolerance fits every loss. The loss and its expected value are reported.

    Args:
        model: the policy.
        args: the trainer's config.
        layout: the layout of its rows.
        has_ref_model: whether the reference is a separate model.
        use_rewards: whether the loss uses the rewards of the rows.
        reduce: sums a tensor over the ranks.
        autocast: returns the autocast context of the forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        *,
        layout: Layout,
        has_ref_model: bool,
        use_rewards: bool,
        reduce: Callable[[Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.args = args
        self.layout = layout
        self.has_ref_model = has_ref_model
        self.use_rewards = use_rewards
        self._reduce = reduce
        self._autocast = autocast
        dtype = args.mixed_precision_dtype() or next(model.parameters()).dtype
        low = dtype in (torch.bfloat16, torch.float16)
        # Nats per token: mean over all tokens, and for each response
        self.tolerance, self.tolerance_each = (0.05, 0.5) if low else (1e-4, 1e-3)
        # Σ |policy − reference|, tokens, responses that are off, Σ loss, Σ constant, examples
        self.sums: Tensor | None = None
        self.batches: list[PackedBatch] = []

    def _rewards(self, batch: PackedBatch, group: Tensor) -> Tensor | None:
        """Return the rewards of a group, or None if float64 is not available for the closed forms."""
        if not self.use_rewards or batch.rewards is None:
            return None
        rewards = batch.rewards[group]
        return rewards if widest_float(rewards.device) == torch.float64 else rewards.cpu()

    def add(self, sums: Tensor, batch: PackedBatch, losses: Tensor) -> None:
        """Add a micro-batch: `[R]` policy log-probs, the batch, `[B]` preference losses."""
        args = self.args
        assert batch.reference_logps is not None  # computed before training
        weights = widest(batch.weights)
        constants = torch.cat(
            [
                move(
                    step_zero_losses(
                        args.loss_type,
                        beta=args.beta,
                        shape=(group.shape[0], group.shape[1]),
                        rewards=self._rewards(batch, group),
                        reward_scale=getattr(args, "reward_scale", 1.0),
                        label_smoothing=getattr(args, "label_smoothing", 0.0),
                    ),
                    sums.device,
                    non_blocking=True,
                )
                for group in batch.groups
            ]
        )
        real = weights.max()  # 0 for the filler of a rank without examples
        off = widest((sums.detach() - batch.reference_logps).abs())
        tokens = batch.response_tokens
        part = torch.stack(
            [
                off.sum() * real,
                widest(tokens.sum()) * real,
                widest((off / tokens > self.tolerance_each).sum()) * real,
                (widest(losses.detach()) * weights).sum(),
                (constants * weights).sum(),
                weights.sum(),
            ]
        )
        self.sums = part if self.sums is None else self.sums + part
        self.batches.append(batch)

    def finish(self) -> dict[str, float]:
        """Return `loss`, `expected` and `nats_per_token`, or raise StepZeroError if the check fails."""
        assert self.sums is not None  # at least one micro-batch
        off, tokens, wrong, loss, expected, examples = self._reduce(self.sums).tolist()
        values = {
            "loss": loss / examples,
            "expected": expected / examples,
            "nats_per_token": off / max(tokens, 1.0),
        }
        if wrong == 0 and values["nats_per_token"] <= self.tolerance:
            logger.info(
                "step-0 check: loss %.6f, expected %.6f", values["loss"], values["expected"]
            )
            return values
        cause, what, fix = self._diagnose()
        error = StepZeroError(
            f"before the first update the loss is {values['loss']:.6g}, but {values['expected']:.6g} is "
            "expected because policy and reference model are the same",
            code="training.step-zero",
            details={"cause": cause, **values},
            where="step-0 check",
            why=f"{what}; log-probs differ by {values['nats_per_token']:.2g} nats per token on average, "
            f"{wrong:.0f} responses by more than {self.tolerance_each:g}",
            fix=fix,
        )
        error.values = values
        raise error

    def _worst(self, plain: bool = False) -> tuple[float, float]:
        """Return the largest difference of any response from the reference, in eval mode, over all ranks.

        Args:
            plain: whether to run the model's own forward too, one response at a time.

        Returns:
            The differences of the step's forward, and of plain forwards (0 without `plain`), in nats
            per token.
        """
        model, worst = self.model, [0.0, 0.0]
        model.eval()
        for batch in self.batches:
            assert batch.reference_logps is not None
            tokens, real = batch.response_tokens, batch.weights.max().item()
            with torch.no_grad(), self._autocast():
                logps = token_logprobs(model, batch.model_inputs)
                ways = [response_sums(logps, batch.response_index, len(tokens))]
                ways += [plain_sums(model, batch)] if plain else []
            for number, sums in enumerate(ways):
                off = (sums - batch.reference_logps).abs() / tokens
                worst[number] = max(worst[number], off.max().item() * real)
        model.train()
        of_ranks = all_gather_dict({rank(): worst}).values()
        return max(off[0] for off in of_ranks), max(off[1] for off in of_ranks)

    def _diagnose(self) -> tuple[str, str, str]:
        """Name of the cause, its description, and the fix."""
        model, each = self.model, self.tolerance_each
        replicated = is_replicated(model)
        if self._worst()[0] <= each:
            if replicated and is_noisy(model):
                names = text_of(noise_in(model))
                return (
                    "noise",
                    f"the policy has noise{names and f' ({names})'}",
                    "report the type of the model" if self.args.disable_dropout
                    else "set disable_dropout=True (the default)",
                )  # fmt: skip
            return (
                "train-mode",
                "the policy differs between train and eval mode",
                "check it for noise",
            )
        if self.has_ref_model:
            return "ref-model", "ref_model and policy have different log-probs", "check ref_model"
        if not replicated:
            return (
                "reference",
                "the reference log-probs are not those of the policy: the cache is stale, the tokens have "
                "changed, or log-probs depend on the other examples of a forward",
                "remove the directory reference-cache and restart; if that does not help, report the type of "
                "the model",
            )
        if not is_deterministic(model):
            return (
                "not-deterministic",
                "two forwards of the model in eval mode produce different log-probs",
                "use a model with a deterministic forward, or set step0_check=False",
            )
        step, plain = self._worst(plain=True)
        if plain <= each < step:
            return (
                "layout",
                f"with layout {self.layout} the policy computes different log-probs than with one response "
                "at a time, which match the reference log-probs",
                "set per_device_train_batch_size=1 or another layout, and report the type of the model",
            )
        return (
            "reference",
            "the reference log-probs are not those of the policy: the cache is stale, or the tokens have "
            "changed",
            "remove the directory reference-cache and restart",
        )


def plain_sums(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the log-prob of each response, `[R]`, from the model's own forward, one at a time."""
    inputs = batch.model_inputs
    ids, positions = inputs.input_ids, inputs.position_ids.reshape(-1)
    if inputs.rows is not None:
        rows = [ids[0, start:stop] for start, stop in inputs.rows]
    elif inputs.plan is not None:
        flat = ids[0]
        rows = [flat[[*range(a, b), *range(s, e)]] for s, e, a, b in inputs.plan.segments]
    else:
        assert inputs.attention_mask is not None  # padded
        rows = [row[mask.bool()] for row, mask in zip(ids, inputs.attention_mask, strict=True)]
    sums = []
    for number, row in enumerate(rows):
        own = batch.response_index == number
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        logits = logits[positions[inputs.predict_index[own]]]
        sums.append(logprobs_from_logits(logits, inputs.labels[own]).sum())
    return torch.stack(sums)
