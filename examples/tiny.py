"""A model, a tokenizer and preference rows that train in seconds on a CPU: replace them with yours."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from rpo_trainer.data.quickstart import character_tokenizer

TOKENIZER = character_tokenizer()  # AutoTokenizer.from_pretrained(...)


def model() -> Any:
    """A random Llama of two layers; AutoModelForCausalLM.from_pretrained(...)."""
    set_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return AutoModelForCausalLM.from_config(config)


ROWS = [
    {
        "prompt": f"{n} + 1 = ",
        "chosen": str(n + 1),
        "rejected": "no idea",
        "chosen_reward": 5.0,
        "rejected_reward": 2.0,
    }
    for n in range(16)
]
SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "global_batch_size": 8,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
}
