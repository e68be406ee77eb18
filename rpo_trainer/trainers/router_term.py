"""`loss/router_aux`: the load-balancing loss of mixtures of experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.errors import RecipeError
from rpo_trainer.models.sharding import device_of
from rpo_trainer.models.unwrap import is_classifier, transformers_model
from rpo_trainer.runtime.devices import widest
from rpo_trainer.runtime.distributed import is_main
from rpo_trainer.step.batch import PackedBatch, StepBatch
from rpo_trainer.step.forward import router_sums_only
from rpo_trainer.step.router_loss import (
    NoRouterLoss,
    RouterLoss,
    balance,
    configured_coefficients,
    has_switch,
    request,
    router_loss_of,
)
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.metrics import MetricSums

logger = logging.getLogger(__name__)

NAME = "loss/router_aux"


class RouterTerm:
    """The loss over the forwards of a step, or of an evaluation.

    The frequency of each expert is a mean over the global batch, and a factor of the gradient of every token.
    If a step is one forward, the sums are reduced over ranks between forward and backward. If it has several,
    `prepare` runs them once before, without gradients and without the head.

    Attributes:
        loss: how the loss of the model is computed.
        coefficient: weight in the total loss.
    """

    def __init__(
        self, loss: RouterLoss, coefficient: float, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self.loss = loss
        self.coefficient = coefficient
        self._reduce = reduce
        self._pending: Sequence[PackedBatch] = ()
        self._step: Tensor | None = None
        self._evaluated: Tensor | None = None

    # --- training ---

    def begin_step(self, batches: Sequence[PackedBatch | StepBatch]) -> None:
        """Set the micro-batches of the next optimizer step."""
        forwards = [part for batch in batches for part in batch.micro_batches]
        self._pending = forwards if len(forwards) > 1 else ()
        self._step = None

    def prepare(self, forward: Callable[[PackedBatch], Tensor]) -> None:
        """Compute the sums of the step if it has several micro-batches, once per step.

        Args:
            forward: returns the sums of a micro-batch. Training will draw the same random numbers again.
        """
        if not self._pending:
            return
        with torch.no_grad(), _same_noise_again():
            total = sum(forward(batch) for batch in self._pending)
        assert isinstance(total, Tensor)
        self._step, self._pending = self._reduce(total), ()

    def sums_only(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Return the sums of a micro-batch, `[2E + 1]` float64, from a forward without the head."""
        inputs = replace(batch.model_inputs)
        request(inputs, self.loss, only=True)
        return _real(router_sums_only(model, inputs), batch)

    def request(self, batch: PackedBatch) -> None:
        """Make the forward pass of a micro-batch compute the sums too."""
        request(batch.model_inputs, self.loss)

    def add_to(self, loss: Tensor, batch: PackedBatch, metrics: MetricSums | None) -> Tensor:
        """Add this term to the loss of a micro-batch after its forward.

        Args:
            metrics: the training metrics; None in evaluation, see `evaluated`.
        """
        term, fraction = self._fraction(batch, training=metrics is not None)
        if metrics is not None:
            metrics.add_ratio(NAME, term, fraction)
        return loss + self.coefficient * term.to(loss.dtype)

    def _fraction(self, batch: PackedBatch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch, and its fraction of the tokens of the global batch.

        Over the micro-batches and ranks of a step the first adds up to the loss, the second to 1. In
        evaluation it is the loss of the micro-batch; `evaluated` is the loss over all data.
        """
        request = batch.model_inputs.router
        assert request is not None and request.sums is not None  # its forward is done
        sums, request.sums = _real(request.sums, batch), None
        if training:
            total = self._reduce(sums.detach()) if self._step is None else self._step
        else:
            total = sums.detach()
            self._evaluated = total if self._evaluated is None else self._evaluated + total
        total = torch.cat([total[:-1], total[-1:].clamp_min(1)])  # a filler has no tokens
        return balance(total, sums), sums.detach()[-1] / total[-1]

    # --- evaluation ---

    def evaluated(self) -> float:
        """Return the loss over all micro-batches and ranks since the last call."""
        assert self._evaluated is not None  # at least one micro-batch
        total = self._reduce(self._evaluated)
        self._evaluated = None
        return float(balance(total, total))


def _real(sums: Tensor, batch: PackedBatch) -> Tensor:
    """Return 0 for the filler of a rank that has no example left, else 1."""
    real: Tensor = batch.weights.max()
    return widest(sums) * widest(real)


def _same_noise_again() -> Any:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def router_term(
    model: nn.Module, args: BaseConfig, reduce: Callable[[Tensor], Tensor]
) -> RouterTerm | None:
    """Return the term if the config, or else the config of the model, enables it, and log it.

    Raises:
        RecipeError: `router_aux_loss_coef` is set, and the model's loss cannot be computed.
    """
    inner, given = transformers_model(model), args.router_aux_loss_coef
    wanted = configured_coefficients(inner.config)
    if given == 0.0 or (given is None and not wanted):
        _log_off(inner.config, given)
        return None
    try:
        kwargs = args.gradient_checkpointing_kwargs
        if args.gradient_checkpointing and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
            raise NoRouterLoss(
                "gradient checkpointing with use_reentrant=True has no gradient of it"
            )
        loss = router_loss_of(inner, device_of(model))
        if is_classifier(model) and not inner._rpo_head.fused:
            raise NoRouterLoss("the forward of the classifier does not return router logits")
    except NoRouterLoss as error:
        if given is not None:
            raise RecipeError(
                f"router_aux_loss_coef is {given:g}, but the load-balancing loss of {type(inner).__name__} "
                "cannot be computed",
                code="model.no-router-loss",
                where=type(args).__name__,
                why=str(error),
                fix="set it to 0, or remove it",
            ) from error
        _warn_left_out(wanted, str(error))
        return None
    coefficient = loss.coefficient if given is None else given
    if given is None and not coefficient:
        _warn_left_out(wanted, f"{type(inner).__name__} does not use them")
        return None
    if is_main():
        logger.info(
            "%s: load-balancing loss of %d routers, %d of %d experts per token, weight %g (%s); with "
            "gradient accumulation each step runs an additional forward without gradients",
            NAME, loss.layers, loss.top_k, loss.experts, coefficient,
            "the model's config" if given is None else "router_aux_loss_coef",
        )  # fmt: skip
    return RouterTerm(loss, coefficient, reduce)


def _log_off(config: Any, given: float | None) -> None:
    if has_switch(config) and is_main():
        why = (
            "the model's config does not enable it (output_router_logits is false); to add it, set "
            "router_aux_loss_coef"
            if given is None
            else "router_aux_loss_coef is 0"
        )
        logger.info("%s: off, because %s", NAME, why)


def _warn_left_out(wanted: dict[str, float], why: str) -> None:
    if is_main():
        logger.warning(
            "the model's config enables a load-balancing loss (%s): it is not added to the loss, because %s",
            ", ".join(f"{name}={value}" for name, value in wanted.items()), why,
        )  # fmt: skip
