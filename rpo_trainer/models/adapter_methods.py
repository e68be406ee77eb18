"""Which PEFT methods the packed step can train, and how their adapters may start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rpo_trainer.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig

# Methods that are no change of weights, by `peft_type`.
_NOT_WEIGHTS = {
    "ADAPTION_PROMPT": "it puts a prompt of its own into the attention of every row",
    "ADALORA": "its rank schedule and its regulariser need calls from a training loop made for it",
    "XLORA": "it runs the model twice to mix adapters row by row",
    "POLY": "it needs a task id with every row",
}
# Starts of LoRA that PEFT makes from data, in a step of its own before or after the adapter is added.
_FROM_DATA = ("eva", "corda", "lora_ga")
# Starts that take from the base what they put into the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_supported_method(config: PeftConfig) -> None:
    """Raises ModelError for methods that the packed step cannot be right for."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        why = (
            "its virtual tokens stand before a row, and a row here holds many examples, "
            "of which only the first would see them"
        )
    elif kind in _NOT_WEIGHTS:
        why = _NOT_WEIGHTS[kind]
    elif getattr(config, "alora_invocation_tokens", None) is not None:
        kind, why = "activated LoRA", "it is switched on by tokens of a row, which here is packed"
    elif getattr(config, "monteclora_config", None) is not None:
        kind, why = "MonteCLoRA", "it adds a term of its own to the loss, which nobody would add"
    else:
        return
    raise ModelError(
        f"the adapter method {kind} cannot be trained here",
        code="adapter.unsupported-method",
        why=why,
        fix="use LoRA (with DoRA or rsLoRA if you like), or another method that changes weights",
    )


def require_plain_start(config: PeftConfig) -> None:
    """Raises ModelError where a fresh adapter would need data that a config does not bring."""
    start = getattr(config, "init_lora_weights", True)
    if start is False:
        raise ModelError(
            "init_lora_weights=False starts the adapter at random",
            code="adapter.random-start",
            why="the policy would not start as the model it is made from",
            fix="leave init_lora_weights out",
        )
    if isinstance(start, str) and start in _FROM_DATA:
        raise ModelError(
            f"init_lora_weights={start!r} is made from data, in a step that is not part of a trainer",
            code="adapter.data-start",
            why="without that step PEFT starts with other weights, or not at all",
            fix="wrap the model yourself as PEFT's documentation says and pass the wrapped model, "
            "or take another start (pissa, olora, orthogonal)",
        )


def changes_base(config: PeftConfig) -> bool:
    """Whether the start of the adapter changes the weights below it."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model."""
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def require_supported_adapter(model: nn.Module) -> None:
    """The same as `require_supported_method` for a model that somebody else has wrapped."""
    from peft import PeftMixedModel

    if isinstance(model, PeftMixedModel):
        raise ModelError(
            "a PeftMixedModel cannot be trained here",
            code="adapter.unsupported-method",
            why="PEFT cannot save one",
            fix="take a PeftModel with one adapter",
        )
    if is_adapted(model):
        for config in model.peft_config.values():  # type: ignore[operator]
            require_supported_method(config)
