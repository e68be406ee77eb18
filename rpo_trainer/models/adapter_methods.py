"""PEFT methods that the packed step can train, and supported initializations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rpo_trainer.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig

# Methods that do not modify weights, by `peft_type`.
_NOT_WEIGHTS = {
    "ADAPTION_PROMPT": "it adds a prompt to the attention of every row",
    "ADALORA": "its rank schedule and regularizer require a dedicated training loop",
    "XLORA": "it runs the model twice to mix adapters row by row",
    "POLY": "it requires a task id for every row",
}
# LoRA initializations that PEFT computes from data in a separate step.
_FROM_DATA = ("eva", "corda", "lora_ga")
# Initializations that subtract the adapter from the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_supported_method(config: PeftConfig) -> None:
    """Raise ModelError for methods that are incorrect with the packed step."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        why = (
            "its virtual tokens precede a row, and a packed row holds many examples, "
            "of which only the first could attend to them"
        )
    elif kind in _NOT_WEIGHTS:
        why = _NOT_WEIGHTS[kind]
    elif getattr(config, "alora_invocation_tokens", None) is not None:
        kind, why = "activated LoRA", "it is activated by tokens of a row, and rows are packed"
    elif getattr(config, "monteclora_config", None) is not None:
        kind, why = "MonteCLoRA", "it requires a loss term that is not computed here"
    else:
        return
    raise ModelError(
        f"the adapter method {kind} is not supported",
        code="adapter.unsupported-method",
        why=why,
        fix="use LoRA (DoRA and rsLoRA included), or another method that modifies weights",
    )


def require_plain_start(config: PeftConfig) -> None:
    """Raise ModelError if a new adapter's initialization requires data, or is random."""
    start = getattr(config, "init_lora_weights", True)
    if start is False:
        raise ModelError(
            "init_lora_weights=False initializes the adapter at random",
            code="adapter.random-start",
            why="the policy would not start as its base model",
            fix="omit init_lora_weights",
        )
    if isinstance(start, str) and start in _FROM_DATA:
        raise ModelError(
            f"init_lora_weights={start!r} is computed from data in a step that trainers do not have",
            code="adapter.data-start",
            why="without that step PEFT uses other weights or fails",
            fix="wrap the model yourself as described in PEFT's documentation and pass the wrapped model, "
            "or use another initialization (pissa, olora, orthogonal)",
        )


def changes_base(config: PeftConfig) -> bool:
    """Whether the adapter's initialization changes the base weights."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model."""
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def require_supported_adapter(model: nn.Module) -> None:
    """Check the method of an adapter that the caller has created, see `require_supported_method`."""
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise ModelError(
            "PeftMixedModel is not supported",
            code="adapter.unsupported-method",
            why="PEFT cannot save one",
            fix="use a PeftModel with one adapter",
        )
    if is_adapted(model):
        for config in model.peft_config.values():  # type: ignore[operator]
            require_supported_method(config)
