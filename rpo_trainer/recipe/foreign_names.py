"""Names of settings in TRL, transformers and other tools, and what to use instead of each."""

from __future__ import annotations

from typing import NamedTuple


class ForeignName(NamedTuple):
    """What to use instead of a name, by its place; "" if the name is not known there.

    Attributes:
        field: the field of a recipe with the same meaning.
        recipe: as a key of a recipe, if no field has this meaning.
        training_args: under `training_args` of a recipe, if it is a field of the recipe.
        config: as an argument of the config of a trainer.
        trainer: as an argument of a trainer.
    """

    field: str = ""
    recipe: str = ""
    training_args: str = ""
    config: str = ""
    trainer: str = ""


_TOGETHER = "set max_length, the maximum length of prompt + response, instead"
_PACKED = "remove it: rows are packed without padding if the model supports it (see layout)"
_ALWAYS = "remove it: reference log-probs are always computed once, before training, and cached"
_ASSISTANT = "remove it: only tokens of assistant turns are trained, in all data formats"
_TEMPLATE = "set it on the tokenizer that is passed as processing_class instead"
_ROUNDS = "train in rounds instead: pass the output of one as `model` and `ref_model` of the next"
_NOT_OFFERED = "remove it: it is not supported"
_PROCESSES = "remove it: the number of tokenization processes is chosen automatically"
_ROWS = "use rows with `prompt` and `response`, or with `messages`"
_LOADED = "load the model with from_pretrained(...) and pass it as `model`"
_IN_CONFIG = "set it in the config"

FOREIGN_NAMES = {
    # --- length, batch and schedule ---
    "epochs": ForeignName("num_train_epochs"),
    "num_epochs": ForeignName("num_train_epochs"),
    "steps": ForeignName("max_steps"),
    "batch_size": ForeignName("global_batch_size"),
    "train_batch_size": ForeignName("global_batch_size"),
    "gradient_accumulation_steps": ForeignName(
        "global_batch_size",
        training_args="`global_batch_size`; gradient accumulation follows from it",
    ),
    "per_device_train_batch_size": ForeignName(
        "micro_batch_size", training_args="`micro_batch_size`"
    ),
    "lr": ForeignName("learning_rate"),
    "optimizer": ForeignName("optim"),
    "scheduler": ForeignName("lr_scheduler_type"),
    "warmup": ForeignName("warmup_steps"),
    "warmup_ratio": ForeignName("warmup_steps", training_args="`warmup_steps`"),
    "activation_checkpointing": ForeignName(training_args="`gradient_checkpointing`"),
    "activation_offloading": ForeignName(config=_NOT_OFFERED),
    "optimizer_cls_and_kwargs": ForeignName(
        trainer="set optim and optim_args in the config, or pass optimizers=(optimizer, None)"
    ),
    # --- what is written, and when ---
    "output_dir": ForeignName("run_dir", training_args="the recipe's `run_dir`"),
    "eval_strategy": ForeignName(training_args="`eval_steps`"),
    "save_strategy": ForeignName(training_args="`save_steps`"),
    "logging_strategy": ForeignName(training_args="`logging_steps`"),
    "compute_metrics": ForeignName(
        trainer="subclass the trainer and extend `evaluate`: an evaluation returns the loss, margins and "
        "accuracies"
    ),
    "preprocess_logits_for_metrics": ForeignName(
        trainer="remove it: the logits are never materialized"
    ),
    # --- losses ---
    "beta": ForeignName(trainer=_IN_CONFIG),
    "ref_policy_kl_penalty": ForeignName("beta", config="write beta"),
    "eta": ForeignName("reward_scale"),
    "gt_reward_scale": ForeignName("reward_scale", config="write reward_scale (of RPOConfig)"),
    "loss": ForeignName("loss_type"),
    "loss_weights": ForeignName(
        config="write sft_loss_weight: the weight of the SFT term; the weight of the preference loss is 1"
    ),
    "compute_loss_func": ForeignName(
        trainer="subclass the trainer and return the losses from `losses`"
    ),
    "rpo_alpha": ForeignName(
        recipe="use `sft_loss_weight` for the NLL term; `kind: rpo` for Reward-aware Preference "
        "Optimization",
    ),
    "ld_alpha": ForeignName(config=_NOT_OFFERED),
    "f_divergence_type": ForeignName(config=_NOT_OFFERED),
    "f_alpha_divergence_coef": ForeignName(config=_NOT_OFFERED),
    "use_weighting": ForeignName(config=_NOT_OFFERED),
    "discopop_tau": ForeignName(config=_NOT_OFFERED),
    "center_rewards_coefficient": ForeignName(config=_NOT_OFFERED),
    # --- the reference ---
    "ref_model": ForeignName("reference"),
    "reference_free": ForeignName(
        config="remove it: losses without a reference model are not supported"
    ),
    "precompute_ref_log_probs": ForeignName(config=_ALWAYS),
    "precompute_ref_batch_size": ForeignName(config="write reference_batch_tokens"),
    "sync_ref_model": ForeignName(config=_ROUNDS),
    "ref_model_mixup_alpha": ForeignName(config=_ROUNDS),
    "ref_model_sync_steps": ForeignName(config=_ROUNDS),
    # --- the model ---
    "model_name_or_path": ForeignName("name_or_path"),
    "lora": ForeignName("peft"),
    "peft_config": ForeignName("peft"),
    "model_init": ForeignName(trainer="pass the model itself as `model`"),
    "model_init_kwargs": ForeignName(config=_LOADED),
    "trust_remote_code": ForeignName(config=_LOADED),
    "quantization_config": ForeignName(trainer="load the model with it and pass it as `model`"),
    "model_adapter_name": ForeignName(config="pass the model with its adapter active"),
    # --- the tokenizer ---
    "tokenizer": ForeignName(trainer="write processing_class"),
    "reward_processing_class": ForeignName(trainer="write processing_class"),
    "chat_template_path": ForeignName(config=_TEMPLATE),
    "eos_token": ForeignName(config=_TEMPLATE),
    "pad_token": ForeignName(config=_TEMPLATE),
    # --- the length of rows ---
    "max_seq_length": ForeignName(
        "max_length", config="write max_length", trainer="set max_length in the config"
    ),
    "max_length": ForeignName(trainer=_IN_CONFIG),
    "max_prompt_length": ForeignName(config=_TOGETHER),
    "max_completion_length": ForeignName(config=_TOGETHER),
    "max_target_length": ForeignName(config=_TOGETHER),
    "truncation_mode": ForeignName(config="write truncation: `drop` or `cut`"),
    "padding_free": ForeignName(config=_PACKED),
    "packing": ForeignName(config=_PACKED, trainer=_PACKED),
    "eval_packing": ForeignName(config=_PACKED),
    "packing_strategy": ForeignName(config=_PACKED),
    "pad_to_multiple_of": ForeignName(config=_PACKED),
    # --- the data ---
    "assistant_only_loss": ForeignName(config=_ASSISTANT),
    "completion_only_loss": ForeignName(config=_ASSISTANT),
    "shuffle": ForeignName(
        recipe="set it under `training_args`; by default each epoch is a new permutation"
    ),
    "shuffle_dataset": ForeignName(
        config="remove it, or set shuffle: each epoch is a new permutation unless shuffle=False"
    ),
    "dataset_num_proc": ForeignName(config=_PROCESSES, trainer=_PROCESSES),
    "dataset_text_field": ForeignName(config=_ROWS, trainer=_ROWS),
    "dataset_kwargs": ForeignName(config=_NOT_OFFERED),
    "data_collator": ForeignName(
        trainer="remove it: rows are packed by the collator of the trainer"
    ),
    "formatting_func": ForeignName(
        trainer="map the dataset to rows with `messages`, or with `prompt` and `response`"
    ),
    # --- sampling ---
    "rollout_func": ForeignName(trainer="remove it: these trainers do not sample"),
    "reward_funcs": ForeignName(trainer="score rows before training (`rpo-trainer score`)"),
}
FOREIGN_LOSSES = {"sigmoid": "dpo"}  # other name of the loss → its name here
RPO_ALPHA = (
    "sft_loss_weight for the SFT term, and RPOTrainer for Reward-aware Preference Optimization"
)
LOSS_SETTINGS = {"sft": "sft_loss_weight"}  # loss of TRL → setting here


def field_of(name: str) -> str:
    """Return the field of a recipe for a foreign name, else the name itself."""
    return (FOREIGN_NAMES[name].field if name in FOREIGN_NAMES else "") or name
