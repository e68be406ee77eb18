"""Load-balancing loss of a mixture of experts, computed from sums over micro-batches.

    loss = E · Σ_e f_e · P_e

f_e is the mean number of times that a token is routed to expert e, P_e the mean router probability of e, both
over all tokens and layers (Switch Transformer, arXiv 2101.03961, equations 4 to 6, as computed by
`load_balancing_loss_func` of transformers). Both means are over the global batch, so a micro-batch yields
sums, which the trainer adds over micro-batches and ranks. A token of a shared prompt counts once for each
response.

Shapes: `E` experts, `T` tokens of a micro-batch. Sums are `[2E + 1]`: number of tokens routed to each expert,
probability of each expert, and number of tokens times layers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpo_trainer.errors import ModelError
from rpo_trainer.models.multimodal import CLASSIFIER, decoder_of
from rpo_trainer.step.batch import ModelInputs, RouterRequest

# Names of coefficients of router losses in the configs of transformers and of custom model code.
_COEFFICIENT = re.compile(r"(aux|router_z|moe|balanc).*(coef|alpha|loss_weight)")
_OWN = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of causal language models


class NoRouterLoss(Exception):
    """The load-balancing loss of the model cannot be computed; the message is the reason."""


@dataclass(frozen=True)
class RouterLoss:
    """Parameters of a model's load-balancing loss.

    Attributes:
        coefficient: coefficient in the model's config.
        top_k: number of experts per token.
        experts: E.
        layers: number of routers whose logits a forward returns.
    """

    coefficient: float
    top_k: int
    experts: int
    layers: int


# --- sums of a forward ---


def router_sums(logits: Sequence[Tensor], uses: Tensor, top_k: int) -> Tensor:
    """Compute the sums of a micro-batch, `[2E + 1]`, at least float32; the gradient is that of the
    probabilities.

    Args:
        logits: router logits of each layer, `[T, E]` or `[rows, length, E]`.
        uses: number of responses that use each token, 0 for padding; T values in any shape.
    """
    experts, device = logits[0].shape[-1], uses.device
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    weights = uses.reshape(-1, 1).to(dtype)
    chosen = torch.zeros(experts, dtype=dtype, device=device)
    probability = torch.zeros(experts, dtype=dtype, device=device)
    # Sums of bfloat16 products would only have three correct digits.
    with torch.autocast(device.type, enabled=False):
        for layer in logits:
            p = layer.to(device, dtype).reshape(-1, experts).softmax(-1)
            ones = torch.zeros_like(p).scatter_(1, p.detach().topk(top_k, dim=-1).indices, 1.0)
            chosen = chosen + (ones * weights).sum(0)
            probability = probability + (p * weights).sum(0)
        return torch.cat([chosen, probability, weights.sum(0) * len(logits)])


def balance(total: Tensor, part: Tensor) -> Tensor:
    """Return the contribution of a micro-batch to the loss of its global batch, a scalar.

    Args:
        total: sums of the global batch, constants.
        part: sums of the micro-batch; only the probabilities are used, with their gradient.
    """
    experts = len(total) // 2
    fraction = total[:experts] / total[-1]
    return experts * (fraction * part[experts:-1]).sum() / total[-1]


# --- between the step and the trainer ---


def request(model_inputs: ModelInputs, loss: RouterLoss, *, only: bool = False) -> None:
    """Make the next forward of these inputs also return the sums; `only`: return nothing else."""
    model_inputs.router = RouterRequest(top_k=loss.top_k, layers=loss.layers, only=only)


def requested(model_inputs: ModelInputs) -> bool:
    """Whether the forward of these inputs returns the sums."""
    return model_inputs.router is not None


def only_sums(model_inputs: ModelInputs) -> bool:
    """Whether the forward of these inputs returns only the sums."""
    return model_inputs.router is not None and model_inputs.router.only


def sums_of(outputs: Any, model_inputs: ModelInputs) -> Tensor:
    """Compute the sums from a decoder's outputs.

    Raises:
        ModelError: the number of router logits differs from that of the forward at the start of training.
    """
    logits, wanted = getattr(outputs, "router_logits", None) or (), model_inputs.router
    assert wanted is not None
    if len(logits) != wanted.layers:
        raise ModelError(
            f"the forward returned router logits of {len(logits)} layers, but {wanted.layers} layers "
            "have a router",
            code="model.router-logits-missing",
            why="the load-balancing loss would omit the other layers",
            fix="disable `torch_compile`, or set `router_aux_loss_coef` to 0",
        )
    return router_sums(logits, model_inputs.token_uses, wanted.top_k)


def with_sums(answer: Tensor, outputs: Any, model_inputs: ModelInputs) -> Any:
    """Return the result of a forward, together with the sums if they were requested."""
    return (answer, sums_of(outputs, model_inputs)) if requested(model_inputs) else answer


def split_sums(answer: Any, model_inputs: ModelInputs) -> Tensor:
    """Return the result of a forward, and move the sums to `model_inputs.router.sums`."""
    if model_inputs.router is None:
        return answer  # type: ignore[no-any-return]
    answer, model_inputs.router.sums = answer
    return answer  # type: ignore[no-any-return]


# --- what a model has ---


def configured_coefficients(config: Any) -> dict[str, float]:
    """Return the router loss coefficients of a config that enables these losses, by name; otherwise empty."""
    text = config.get_text_config()
    # Custom model code adds the loss without the switch `output_router_logits` of transformers' classes.
    asks = getattr(text, "output_router_logits", getattr(config, "output_router_logits", True))
    return dict(_coefficients(text.to_dict())) if asks else {}


def has_switch(config: Any) -> bool:
    """Whether a config has `output_router_logits` and a coefficient, regardless of their values."""
    text = config.get_text_config()
    return hasattr(text, "output_router_logits") and any(_coefficients(text.to_dict()))


def _coefficients(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _coefficients(value)
        elif (
            isinstance(name, str)
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and value
            and _COEFFICIENT.search(name)
        ):
            yield name, float(value)


def router_loss_of(inner: Any, device: torch.device) -> RouterLoss:
    """Return the parameters of the load-balancing loss that the model's family computes.

    A forward of a few tokens, including padding, checks that both losses are equal.

    Args:
        inner: a transformers causal language model or sequence classifier.

    Raises:
        NoRouterLoss: the family has no such loss, router logits are not available, or the losses differ.
    """
    text = inner.config.get_text_config()
    ids = torch.arange(1, 13, device=device).reshape(2, 6) % text.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    causal, decoder = not type(inner).__name__.endswith(CLASSIFIER), decoder_of(inner)
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            outputs = decoder(**inputs, output_router_logits=True)
            logits = getattr(outputs, "router_logits", None) or ()
            if not logits:
                raise NoRouterLoss(f"{type(decoder).__name__} returns no router logits")
            family = inner if causal else _causal_twin(inner)
            top_k = getattr(family, "num_experts_per_tok", None) or text.num_experts_per_tok
            expected = (
                getattr(inner(**inputs, output_router_logits=True), "aux_loss", None)
                if causal
                else _family_function(inner)(logits, logits[0].shape[-1], top_k, mask)
            )
            if not isinstance(expected, Tensor):
                raise NoRouterLoss(f"{type(inner).__name__} has no load-balancing loss")
            sums = router_sums(logits, mask, top_k)
            found = balance(sums, sums)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NoRouterLoss(f"a forward with output_router_logits=True fails: {first}") from error
    finally:
        inner.train(training)
    tolerance = 1e-4 if logits[0].dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=0.0):
        raise NoRouterLoss(
            f"{type(inner).__name__} computes a different load-balancing loss: {expected.item():.6g} instead "
            f"of E · Σ f · P = {found.item():.6g}"
        )
    return RouterLoss(_own_coefficient(family, text), top_k, logits[0].shape[-1], len(logits))


def _own_coefficient(family: Any, text: Any) -> float:
    for holder in (family, text):
        for name in _OWN:
            if isinstance(value := getattr(holder, name, None), int | float):
                return float(value)
    return 0.0


def _family_function(inner: nn.Module) -> Any:
    found = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if found is None:
        raise NoRouterLoss(f"the family of {type(inner).__name__} has no load-balancing loss")
    return found


def _causal_twin(classifier: Any) -> Any:
    """Return the family's causal language model without weights, whose settings define the loss."""
    name = type(classifier).__name__.removesuffix(CLASSIFIER) + "ForCausalLM"
    cls = getattr(sys.modules[type(classifier).__module__], name, None)
    if cls is None:
        raise NoRouterLoss(
            f"transformers has no {name}, which would define the load-balancing loss"
        )
    with torch.device("meta"):
        return cls(classifier.config)
