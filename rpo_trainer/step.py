"""One forward of a packed micro-batch: a causal language model gives the log-probability of each trained
token, a sequence classifier the scores of each response.

`install(model)` teaches a transformers model to answer `model(packed=inputs)`. The work happens
inside the model's own `forward`, so whatever wraps the model (DDP, FSDP, DeepSpeed, PEFT) sees a normal call
and its hooks have the weights whole where they are used, the head's included.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpo_trainer.attention import ATTENTION_NAME, in_autocast_dtype, packing_masks
from rpo_trainer.errors import ModelError
from rpo_trainer.logprobs import DEFAULT_TILE_BYTES, linear_logprobs, logprobs_from_logits
from rpo_trainer.multimodal import is_composite, text_decoder

# How a family's logits differ from its head's plain product: config attribute → scale.
_SCALES = {
    "cohere": ("logit_scale", False),
    "cohere2": ("logit_scale", False),
    "granite": ("logits_scaling", True),
    "granitemoe": ("logits_scaling", True),
    "granitemoeshared": ("logits_scaling", True),
}


CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of these classes


@dataclass
class Head:
    """What stands between the last hidden state and the logits.

    Attributes:
        fused: False where only the model's own forward knows; then its logits are taken whole.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    fused: bool = True
    tile_bytes: int = DEFAULT_TILE_BYTES


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside whatever wraps it."""
    seen: Any = model
    while not isinstance(seen, PreTrainedModel):
        inner = getattr(seen, "module", None)
        if inner is None and hasattr(seen, "get_base_model"):
            inner = seen.get_base_model()
        if not isinstance(inner, nn.Module):
            raise ModelError(
                f"{type(model).__name__} holds no transformers model",
                why="the step runs inside a PreTrainedModel's forward",
                fix="pass a transformers causal language model, wrapped by PEFT or not",
            )
        seen = inner
    return seen


def is_classifier(model: nn.Module) -> bool:
    """Whether it is a sequence classifier, the class of reward models, and no language model."""
    return type(causal_lm(model)).__name__.endswith(CLASSIFIER)


def head_of(model: Any) -> Head:
    """Scale and soft-cap of the logits, from the config; checked by the start-up probe."""
    config = model.config.get_text_config()
    head = Head()
    if config.model_type in _SCALES:
        name, divide = _SCALES[config.model_type]
        value = float(getattr(config, name, 1.0))
        head.logit_scale = 1.0 / value if divide else value
    softcap = getattr(config, "final_logit_softcapping", None)
    head.softcap = None if softcap is None else float(softcap)
    return head


def install(model: nn.Module, *, padded: bool = False, head: Head | None = None) -> Any:
    """Teaches the model to answer `model(packed=inputs)`; installing again changes the settings.

    Args:
        model: a causal language model or a sequence classifier, wrapped or not.
        padded: the rows will come padded, so attention stays the model's own.
        head: how logits are made; by default from the model's config.

    Returns:
        The transformers model inside.
    """
    inner = causal_lm(model)
    if not hasattr(inner, "_rpo_stock"):
        inner._rpo_stock = (inner.forward, inner.config._attn_implementation)
        run = _packed_scores if is_classifier(inner) else _packed_logprobs

        @functools.wraps(inner.forward)
        def forward(
            self: Any, *args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any
        ) -> Any:
            return self._rpo_stock[0](*args, **kwargs) if packed is None else run(self, packed)

        # Bound, so that a deep copy of the model runs its own weights and not these.
        inner.forward = types.MethodType(forward, inner)
    inner.set_attn_implementation(inner._rpo_stock[1] if padded else ATTENTION_NAME)
    inner._rpo_head = head or head_of(inner)
    return inner


def uninstall(model: nn.Module) -> None:
    """Gives the model its own forward and attention back."""
    inner = causal_lm(model)
    if hasattr(inner, "_rpo_stock"):
        forward, attention = inner._rpo_stock
        inner.forward = forward
        inner.set_attn_implementation(attention)
        del inner._rpo_stock, inner._rpo_head


def token_logprobs(model: nn.Module, model_inputs: Mapping[str, Any]) -> Tensor:
    """log π of each trained token of a micro-batch made by `batch.pack`: `[N]`, float32 or better."""
    return model(packed=model_inputs)  # type: ignore[no-any-return]


def response_scores(model: nn.Module, model_inputs: Mapping[str, Any]) -> Tensor:
    """Scores of a sequence classifier at each response's last token: `[R, A]`, float32 or better."""
    return model(packed=model_inputs)  # type: ignore[no-any-return]


def _decoder_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    decoder_inputs = {
        "input_ids": inputs["input_ids"],
        "position_ids": inputs["position_ids"],
        "attention_mask": inputs["attention_mask"],
        "use_cache": False,
    }
    if inputs["plan"] is not None:
        decoder_inputs["packing_plan"] = inputs["plan"]
    return decoder_inputs


def _packed_scores(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    decoder_inputs = _decoder_inputs(inputs)
    if not model._rpo_head.fused:
        if inputs["plan"] is not None:
            raise ValueError("the model's own forward scores one response a row")
        scores: Tensor = model._rpo_stock[0](**decoder_inputs).logits
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
    with packing_masks() if inputs["plan"] is not None else contextlib.nullcontext():
        decoder = text_decoder(model) if is_composite(model.config) else model.base_model
        hidden = decoder(**decoder_inputs).last_hidden_state
    last = hidden.reshape(-1, hidden.shape[-1]).index_select(0, inputs["last_index"])
    # Outside autocast: a score of 3.3 in bfloat16 would be right to 0.01 only.
    with torch.autocast(last.device.type, enabled=False):
        scores = model.score(last.to(next(model.score.parameters()).dtype))
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _packed_logprobs(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    head: Head = model._rpo_head
    decoder_inputs = _decoder_inputs(inputs)
    if not head.fused:
        return _through_own_logits(model, decoder_inputs, inputs)
    with packing_masks() if inputs["plan"] is not None else contextlib.nullcontext():
        hidden = text_decoder(model)(**decoder_inputs).last_hidden_state
    gathered = hidden.reshape(-1, hidden.shape[-1]).index_select(0, inputs["predict_index"])
    return _run_head(model, gathered, inputs["labels"], head)


def _run_head(model: Any, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Calls the head as a module, with the fused log-probs in place of its forward, so that its hooks run."""
    module: Any = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        return _generic_head(module, hidden, labels, head)
    hooked = vars(module).get("forward")  # accelerate's hooks put one here

    def fused(x: Tensor) -> Tensor:
        return linear_logprobs(
            in_autocast_dtype(x),
            module.weight,
            labels,
            module.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            tile_bytes=head.tile_bytes,
        )

    vars(module)["forward"] = fused
    try:
        return module(hidden)  # type: ignore[no-any-return]
    finally:
        del vars(module)["forward"]
        if hooked is not None:
            vars(module)["forward"] = hooked


def _generic_head(module: nn.Module, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """A head that is no plain linear layer (LoRA, quantised): its own forward, recomputed by chunks."""

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        logits = module(h) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logprobs_from_logits(logits, y)

    vocabulary = getattr(module, "out_features", None) or 2**17
    size = max(1, head.tile_bytes // (4 * vocabulary))
    pieces = [
        torch.utils.checkpoint.checkpoint(chunk, h, y, use_reentrant=False)
        for h, y in zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    ]
    return torch.cat(pieces)


def _through_own_logits(
    model: Any, decoder_inputs: dict[str, Any], inputs: Mapping[str, Any]
) -> Tensor:
    """The last resort, always right: the model's own forward, all its logits."""
    with packing_masks() if inputs["plan"] is not None else contextlib.nullcontext():
        logits = model._rpo_stock[0](**decoder_inputs).logits
    flat = logits.reshape(-1, logits.shape[-1]).index_select(0, inputs["predict_index"])
    return logprobs_from_logits(flat, inputs["labels"])
