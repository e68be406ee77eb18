"""Preference fine-tuning: SFT, DPO with an SFT loss, RPO, reward models, and recipes that chain them.

The names below are imported on first use, so that `rpo-trainer --help` does not import torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from rpo_trainer.redact import RedactingHandler
from rpo_trainer.runtime.cores import shorten_waits

__version__ = "0.1.0"

_EXPORTS = {
    "SFTTrainer": "rpo_trainer.trainers",
    "SFTConfig": "rpo_trainer.trainers",
    "DPOTrainer": "rpo_trainer.trainers",
    "DPOConfig": "rpo_trainer.trainers",
    "RPOTrainer": "rpo_trainer.trainers",
    "RPOConfig": "rpo_trainer.trainers",
    "RewardTrainer": "rpo_trainer.trainers",
    "RewardConfig": "rpo_trainer.trainers",
    "preference_loss": "rpo_trainer.losses",
    "linear_logprobs": "rpo_trainer.step.logprobs",
    "load_recipe": "rpo_trainer.recipe",
    "run_chain": "rpo_trainer.chain",
}

# Names that scripts import from TRL together with a trainer
_OF_TRL = (
    "DatasetMixtureConfig", "ModelConfig", "ScriptArguments", "TrlParser", "get_dataset",
    "get_kbit_device_map", "get_peft_config", "get_quantization_config",
)  # fmt: skip
_INSTEAD = {
    "DataCollatorForCompletionOnlyLM": "remove it: only responses are trained",
    "setup_chat_format": "set the chat template of the tokenizer",
}

# Logs nothing itself: as the first handler it removes keys from the records that others show.
logging.getLogger(__name__).addHandler(RedactingHandler())

# bitsandbytes advises on a CPU kernel whenever it is imported, by PEFT for example.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)

shorten_waits()  # before torch is loaded, if it is not yet

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from rpo_trainer.chain import run_chain as run_chain
    from rpo_trainer.losses import preference_loss as preference_loss
    from rpo_trainer.recipe import load_recipe as load_recipe
    from rpo_trainer.step.logprobs import linear_logprobs as linear_logprobs
    from rpo_trainer.trainers import (
        DPOConfig as DPOConfig,
    )
    from rpo_trainer.trainers import (
        DPOTrainer as DPOTrainer,
    )
    from rpo_trainer.trainers import (
        RewardConfig as RewardConfig,
    )
    from rpo_trainer.trainers import (
        RewardTrainer as RewardTrainer,
    )
    from rpo_trainer.trainers import (
        RPOConfig as RPOConfig,
    )
    from rpo_trainer.trainers import (
        RPOTrainer as RPOTrainer,
    )
    from rpo_trainer.trainers import (
        SFTConfig as SFTConfig,
    )
    from rpo_trainer.trainers import (
        SFTTrainer as SFTTrainer,
    )


def __getattr__(name: str) -> Any:
    if name in _OF_TRL:
        raise ImportError(f"{name} is not part of {__name__}: keep `from trl import {name}`")
    if name in _INSTEAD:
        raise ImportError(f"{name} is not part of {__name__}: {_INSTEAD[name]}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
