"""Trainers on `transformers.Trainer`: SFT, DPO, RPO."""

from rpo_trainer.trainers.config import (
    DPOConfig,
    PreferenceConfig,
    RPOConfig,
    SFTConfig,
    StepConfig,
)
from rpo_trainer.trainers.preference import DPOTrainer, PreferenceTrainer, RPOTrainer
from rpo_trainer.trainers.sft import SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PreferenceConfig",
    "PreferenceTrainer",
    "RPOConfig",
    "RPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "StepConfig",
]
