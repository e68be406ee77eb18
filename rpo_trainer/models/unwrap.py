"""The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rpo_trainer.errors import ModelError
from rpo_trainer.models.multimodal import CLASSIFIER


def transformers_model(model: nn.Module) -> Any:
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
    return type(transformers_model(model)).__name__.endswith(CLASSIFIER)
