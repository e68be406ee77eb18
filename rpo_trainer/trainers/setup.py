"""What a trainer's constructor makes of its model and tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoTokenizer, TrainingArguments

from rpo_trainer.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from peft import PeftConfig


def require_one_gpu(args: TrainingArguments) -> None:
    """Raises RecipeError where transformers would spread one process over several GPUs."""
    if args.n_gpu > 1:
        raise RecipeError(
            f"{args.n_gpu} GPUs are visible to one process",
            why="one process drives one GPU here",
            fix="start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0",
        )


def with_adapter(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    """The model with a fresh adapter; refuses one that has an adapter already."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ModelError(
            "peft_config was given for a model that has an adapter already",
            fix="leave peft_config out, or merge the adapter first (model.merge_and_unload())",
        )
    return get_peft_model(model, peft_config)


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of the name or path that the model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ModelError(
            "no tokenizer: the model does not know where it came from",
            fix="pass processing_class=tokenizer",
        )
    return AutoTokenizer.from_pretrained(name)


def pad_token_id_of(tokenizer: Any) -> int:
    """Any token will do where the mask hides it: the pad token, else the end token, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0
