"""Trainers on `transformers.Trainer`: SFT, DPO, RPO, reward models.

base              `BaseTrainer`: training from start to end; its docstring lists the step in order
sft               `SFTTrainer`
preference        `DPOTrainer`, `RPOTrainer`
reward            `RewardTrainer`
  reward_data       its rows and ratings
  reward_losses     its losses
  reward_metrics    accuracy, correlation, calibration

Configs:
  base_config       `BaseConfig`: the fields that all share
  config            the configs of the trainers
  config_checks     which settings of a config contradict each other
  argument_checks   which training arguments are accepted, and together with which
  argument_status   what becomes of a training argument
  argument_table    that, for each argument
  argument_page     docs/training-arguments.md, written from the table
  unknown_arguments   arguments of other libraries: other names, and answers
  trl_arguments     arguments of TRL's configs that ours accept
  trl_table         what becomes of each of them

Parts of a trainer:
  setup             model and tokenizer, as the constructor makes them ready
  given_rows        rows of a formatting function, of plain text, tokenized rows
  data_sets         the rows that a trainer is given, tokenized and checked against the model
  examples          tokenized examples, and the collator that packs them
  fits              whether the examples fit the model: vocabulary, positions, end tokens
  loaders           data loaders of training and evaluation
  engine            DDP, FSDP2, DeepSpeed ZeRO
  compiled          `torch_compile`, layer by layer
  noise             dropout and other noise, turned off
  preference_terms  the preference loss and the weighted SFT term of a micro-batch, and their metrics
  step_result       terms of a loss → the loss of a micro-batch
  metrics           sums of terms and metrics, their means in the log
  token_metrics     token accuracy, entropy, mean logits, tokens seen
  router_term       the load-balancing loss of a mixture of experts
  guards            NaN and infinite losses or gradients: stop, or leave the step out
  step_zero         the loss before the first update against its closed form
  early_warnings    signs that preference training goes wrong
  checkpoint        checkpoints: staged, hashed, complete or absent
  outputs           what is written beside the weights
  trackers          trackers that may fail without the run
"""

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
