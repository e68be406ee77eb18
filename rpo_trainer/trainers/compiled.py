"""`torch_compile`: the decoder layers are compiled one by one, for packed rows of any length.

The length of packed rows varies, and their plan is a Python object: compiling the entire model would
recompile it in every step. The layers are alike and do nearly all of the work, so they share one compiled
function with dynamic lengths. Attention, which reads the plan, is not compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from rpo_trainer.errors import ModelError, RecipeError
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.step.attention import ATTENTION_NAME, packed_attention


def compile_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Compile the layers instead of the entire model, as accelerate would.

    Raises:
        ModelError: no layers were found in the model.
        RecipeError: the backend does not work on this machine.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    backend, mode = plugin.backend.value.lower(), plugin.mode
    plugin.backend = DynamoBackend.NO
    settings = {"backend": backend, "mode": None if mode == "default" else mode, "dynamic": True}
    _require_compiler(settings, accelerator.device)
    outside: Any = torch.compiler.disable  # untyped
    AttentionInterface.register(ATTENTION_NAME, outside(packed_attention))
    layers = [
        module for module in transformers_model(model).modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]  # fmt: skip
    if not layers:
        raise ModelError(
            f"torch_compile: no layers to compile were found in {type(transformers_model(model)).__name__}",
            code="model.not-compilable",
            why="only layers are compiled, so that rows of all lengths share the result",
            fix="remove torch_compile for this model",
        )
    for layer in layers:
        layer.compile(**settings)


def _require_compiler(settings: dict[str, Any], device: torch.device) -> None:
    """Try the backend early: it may need a compiler that is not installed."""
    try:
        torch.compile(torch.sin, **settings)(torch.zeros(2, device=device))
    except Exception as error:
        raise RecipeError(
            f"torch_compile: the backend {settings['backend']} does not work on this machine",
            code="training.compiler-fails",
            why=str(error).strip().splitlines()[0],
            fix="install what is missing, or remove torch_compile",
        ) from error
