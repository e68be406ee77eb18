"""Recognize the tool of a config file by its top-level keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LLAMA_FACTORY, AXOLOTL, TRL, TORCHTUNE = "LLaMA-Factory", "Axolotl", "TRL", "torchtune"


class _Marks(NamedTuple):
    """Keys that identify the files of a tool.

    Attributes:
        required: a key that every file has.
        others: keys that no recipe has; two of them are enough.
    """

    required: str
    others: frozenset[str]


_MARKS = {
    LLAMA_FACTORY: _Marks(
        "model_name_or_path",
        frozenset(
            ("stage", "finetuning_type", "template", "cutoff_len", "dataset", "dataset_dir",
             "lora_rank", "lora_target", "pref_beta", "pref_loss", "pref_ftx", "overwrite_cache",
             "preprocessing_num_workers", "plot_loss", "adapter_name_or_path", "val_size",
             "infer_backend", "export_dir")
        ),
    ),
    AXOLOTL: _Marks(
        "base_model",
        frozenset(
            ("datasets", "sequence_len", "micro_batch_size", "adapter", "rl", "val_set_size",
             "gradient_accumulation_steps", "num_epochs", "sample_packing", "load_in_4bit",
             "load_in_8bit", "dataset_prepared_path", "pretraining_dataset", "strict", "lora_r",
             "model_type", "tokenizer_type", "chat_template", "special_tokens", "processor_type")
        ),
    ),
    TRL: _Marks(
        "model_name_or_path",
        frozenset(
            ("dataset_name", "datasets", "dataset_mixture", "dataset_config", "dataset_train_split",
             "use_peft", "lora_r", "max_length", "beta", "loss_type", "per_device_train_batch_size",
             "gradient_accumulation_steps", "learning_rate", "num_train_epochs", "output_dir",
             "attn_implementation", "dtype", "torch_dtype", "packing")
        ),
    ),
}  # fmt: skip


def foreign_tool(data: Any) -> str | None:
    """Return the tool of a config file, or None if it is not recognized.

    Args:
        data: the content of a YAML file.
    """
    if not isinstance(data, Mapping) or "stages" in data:
        return None
    if any(isinstance(value, Mapping) and "_component_" in value for value in data.values()):
        return TORCHTUNE
    if isinstance(data.get("model"), Mapping):
        return None
    for tool, marks in _MARKS.items():
        if marks.required in data and len(marks.others & set(data)) >= 2:
            return tool
    return None
