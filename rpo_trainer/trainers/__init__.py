"""Trainers on `transformers.Trainer`: SFT, DPO, RPO, reward models."""

from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.config import (
    DPOConfig,
    PreferenceConfig,
    RewardConfig,
    RPOConfig,
    SFTConfig,
)
from rpo_trainer.trainers.preference import DPOTrainer, PreferenceTrainer, RPOTrainer
from rpo_trainer.trainers.reward import RewardTrainer
from rpo_trainer.trainers.sft import SFTTrainer

__all__ = [
    "BaseConfig",
    "DPOConfig",
    "DPOTrainer",
    "PreferenceConfig",
    "PreferenceTrainer",
    "RPOConfig",
    "RPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
