"""The step-0 check: with policy = reference the loss is a constant of the data, known in closed form."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpo_trainer.errors import StepZeroError
from rpo_trainer.logprobs import response_sums
from rpo_trainer.losses import step_zero_losses
from rpo_trainer.step import token_logprobs

if TYPE_CHECKING:
    from rpo_trainer.trainers.preference import PreferenceTrainer

logger = logging.getLogger(__name__)

# Dropout that modules apply by a number of their own rather than by an nn.Dropout.
_DROPOUT_ATTRIBUTES = (
    "dropout",
    "attention_dropout",
    "attn_dropout",
    "hidden_dropout",
    "dropout_p",
)


def dropout_of(config: Any) -> str:
    """The dropout that a configuration gives to the decoder, `name value, ...`; empty: none."""
    fields = config.get_text_config().to_dict()
    found = {
        name: value
        for name, value in fields.items()
        if "drop" in name and not name.startswith(("summary_", "classifier_"))  # of other heads
        if isinstance(value, float) and value > 0
    }
    return ", ".join(f"{name} {value:g}" for name, value in sorted(found.items()))


def disable_dropout(model: nn.Module, why: str = "the reference has none") -> None:
    """Sets every dropout probability of the model to 0, and says so where there was any."""
    if has_dropout(model):
        logger.warning("the model has dropout: it is set to 0, since %s", why)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether any dropout of the model is above 0."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any(
            isinstance(value := getattr(module, name, None), float) and value > 0
            for name in _DROPOUT_ATTRIBUTES
        )
        for module in model.modules()
    )


class StepZero:
    """Watches the forwards of the first global batch, and judges them before the first update.

    What is compared are log-probs per token, policy against reference: the loss is a function of them,
    and they keep one tolerance for every loss. The loss and its constant are reported.
    """

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer
        dtype = trainer.args.mixed_precision_dtype() or next(trainer.model.parameters()).dtype
        low = dtype in (torch.bfloat16, torch.float16)
        # Nats per token: the mean over all of them, and any single response's.
        self.tolerance, self.tolerance_each = (0.05, 0.5) if low else (1e-4, 1e-3)
        # Σ |policy − reference|, tokens, responses that are off, Σ loss, Σ constant, examples
        self.sums: Tensor | None = None
        self.batches: list[dict[str, Any]] = []

    def add(self, sums: Tensor, batch: dict[str, Any], losses: Tensor) -> None:
        """One micro-batch: `[R]` policy log-probs, the batch, `[B]` preference losses."""
        args = self.trainer.args
        weights = batch["weights"].double()
        constants = torch.cat(
            [
                step_zero_losses(
                    args.loss_type,  # type: ignore[arg-type]
                    beta=args.beta,
                    rewards=batch["rewards"][group] if self.trainer.needs_rewards else None,
                    reward_scale=getattr(args, "reward_scale", 1.0),
                    batch_size=len(group),
                ).to(sums.device)
                for group in batch["groups"]
            ]
        )
        real = weights.max()  # 0 for the filler of a rank without examples
        off = (sums.detach() - batch["reference_logps"]).abs().double()
        tokens = batch["response_tokens"]
        part = torch.stack(
            [
                off.sum() * real,
                tokens.sum().double() * real,
                (off / tokens > self.tolerance_each).sum().double() * real,
                (losses.detach().double() * weights).sum(),
                (constants * weights).sum(),
                weights.sum(),
            ]
        )
        self.sums = part if self.sums is None else self.sums + part
        self.batches.append(batch)

    def finish(self) -> dict[str, float]:
        """`loss`, `expected` and `nats_per_token` at step 0; raises StepZeroError if they disagree."""
        assert self.sums is not None  # at least one micro-batch
        trainer = self.trainer
        off, tokens, wrong, loss, expected, examples = trainer._reduce(self.sums).tolist()
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
        what, fix = self._diagnose()
        error = StepZeroError(
            f"before the first update the loss is {values['loss']:.6g}, where policy = reference gives "
            f"{values['expected']:.6g}",
            where="step-0 check",
            why=f"{what}; log-probs differ by {values['nats_per_token']:.2g} nats per token on average, "
            f"{wrong:.0f} responses by more than {self.tolerance_each:g}",
            fix=fix,
        )
        error.values = values
        raise error

    def _worst(self) -> float:
        """Nats per token that the response furthest off is off by, in eval mode."""
        model, worst = self.trainer.model, 0.0
        model.eval()
        for batch in self.batches:
            tokens = batch["response_tokens"]
            with torch.no_grad(), self.trainer.accelerator.autocast():
                logps = token_logprobs(model, batch["model_inputs"])
            sums = response_sums(logps, batch["response_index"], len(tokens))
            off = (sums - batch["reference_logps"]).abs() / tokens
            worst = max(worst, off.max().item())
        model.train()
        return worst

    def _diagnose(self) -> tuple[str, str]:
        trainer, model = self.trainer, self.trainer.model
        if self._worst() <= self.tolerance_each:
            if has_dropout(model):
                return "dropout is on in the policy", "set disable_dropout=True (the default)"
            return "the policy in train mode is not the policy in eval mode", "look for noise in it"
        if trainer.ref_model is not None:
            return "ref_model does not give what the policy gives", "check ref_model"
        return (
            "the reference log-probs are not the policy's: the cache is stale, or the tokens have changed",
            "remove the folder reference-cache and start again",
        )
