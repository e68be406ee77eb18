"""Trainers on `transformers.Trainer`: SFT, DPO, RPO, reward models.

base              `BaseTrainer`: training from start to end; its docstring lists the step in order
sft               `SFTTrainer`
preference        `DPOTrainer`, `RPOTrainer`
reward            `RewardTrainer`
  reward_data       its rows and ratings
  reward_losses     its losses
  reward_metrics    accuracy, correlation, calibration

Configs:
  base_config       `BaseConfig`: the shared fields
  config            the configs of the trainers
  config_checks     checks of the fields of a config
  argument_checks   checks of the arguments of transformers and accelerate
  argument_status   read, refused or harmless
  argument_table    status of each argument
  argument_page     docs/training-arguments.md, written from the table
  unknown_arguments   arguments of other libraries: other names, and answers
  trl_arguments     arguments of TRL's configs that ours accept
  trl_table         status of each of them

Parts of a trainer:
  setup             preparation of model and tokenizer in the constructor
  given_rows        rows of a formatting function, of plain text, tokenized rows
  data_sets         the data sets of a trainer, tokenized and checked against the model
  stored_examples   tokenized examples of data sets, kept on disk
  examples          tokenized examples, and the collator that packs them
  fits              checks of examples against the model: vocabulary, positions, end tokens
  loaders           data loaders of training and evaluation
  engine            DDP, FSDP2, DeepSpeed ZeRO
  compiled          `torch_compile`, layer by layer
  noise             turning off dropout and other noise
  preference_terms  preference loss and weighted SFT loss of a micro-batch, with metrics
  step_result       the loss of a micro-batch from its terms
  metrics           means of metrics for log lines and evaluations
  token_metrics     token accuracy, entropy, mean logits, tokens seen
  router_term       the load-balancing loss of a mixture of experts
  guards            NaN and infinite losses or gradients: stop, or skip the step
  step_zero         check of the loss before the first update against its closed form
  early_warnings    warnings of common problems of preference training
  checkpoint        atomic checkpoints
  background_save   checkpoints that are written while training continues
  manifest          sizes, times and hashes of their files, and of outputs
  outputs           files besides the weights
  trackers          fault-tolerant trackers
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
