"""The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from rpo_trainer.errors import ModelError
from rpo_trainer.models.multimodal import CLASSIFIER


def transformers_model(model: nn.Module) -> Any:
    """Return the transformers model inside its wrappers."""
    seen: Any = model
    while not isinstance(seen, PreTrainedModel):
        inner = getattr(seen, "module", None)
        if inner is None and hasattr(seen, "get_base_model"):
            inner = seen.get_base_model()
        if not isinstance(inner, nn.Module):
            raise ModelError(
                f"{type(model).__name__} contains no transformers model",
                code="model.not-transformers",
                why="the step runs inside a PreTrainedModel's forward",
                fix="pass a transformers causal language model, wrapped by PEFT or not",
            )
        seen = inner
    return seen


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is a sequence classifier (the class of reward models), not a language model."""
    return type(transformers_model(model)).__name__.endswith(CLASSIFIER)


def unwrap_prepared_model(model: Any) -> Any:
    """Return the model as it was before `accelerator.prepare`; the trainer prepares it itself.

    Raises:
        ModelError: its weights are sharded already.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False) or (
        (getattr(model, "tp_size", None) or 1) > 1
    ):
        raise ModelError(
            "the model is sharded (tp_plan or distributed_config)",
            code="model.sharded",
            why="each process computes different examples with the full model",
            fix="load it without tp_plan and distributed_config; FSDP2 and DeepSpeed ZeRO shard it",
        )
    if type(model).__name__ in ("DeepSpeedEngine", "FullyShardedDataParallel") or isinstance(
        model, FSDPModule
    ):
        raise ModelError(
            f"the model is already prepared for an engine (a {type(model).__name__})",
            code="model.already-prepared",
            why="the trainer prepares it according to its arguments",
            fix="pass the model before accelerator.prepare",
        )
    if "_original_forward" in vars(model) or isinstance(model, DistributedDataParallel):
        return extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return model
