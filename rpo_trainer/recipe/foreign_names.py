"""Names of settings in TRL, transformers and other tools, and their replacements."""

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


_TOGETHER = "remove it; max_length limits prompt and response together"
_PACKED = "remove it; rows are packed without padding if the model supports it (layout)"
_ASSISTANT = "remove it; only the assistant's responses are trained"
_TEMPLATE = "set it on the tokenizer that is passed as processing_class"
_NOT_OFFERED = "remove it; it is not supported"
_PROCESSES = "remove it; the number of processes depends on the size of the dataset"
_ROWS = "use rows of `text`, of `prompt` and `completion`, or of `messages`"
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
    "optimizer_cls_and_kwargs": ForeignName(
        trainer="set optim and optim_args in the config, or pass optimizers=(optimizer, None)"
    ),
    # --- output ---
    "output_dir": ForeignName("run_dir", training_args="the recipe's `run_dir`"),
    "eval_strategy": ForeignName(training_args="`eval_steps`"),
    "save_strategy": ForeignName(training_args="`save_steps`"),
    "logging_strategy": ForeignName(training_args="`logging_steps`"),
    "compute_metrics": ForeignName(
        trainer="remove it; loss, accuracies and margins are always logged. For other metrics, subclass the "
        "trainer and extend `evaluate`"
    ),
    "preprocess_logits_for_metrics": ForeignName(
        trainer="remove it; the full logits matrix is never built"
    ),
    # --- losses ---
    "beta": ForeignName(trainer=_IN_CONFIG),
    "ref_policy_kl_penalty": ForeignName("beta", config="use beta"),
    "eta": ForeignName("reward_scale"),
    "gt_reward_scale": ForeignName("reward_scale", config="use reward_scale (of RPOConfig)"),
    "loss": ForeignName("loss_type"),
    "compute_loss_func": ForeignName(
        trainer="subclass the trainer and override `losses`, or add a loss to rpo_trainer.losses.LOSSES"
    ),
    "rpo_alpha": ForeignName(
        recipe="use `sft_loss_weight` for the NLL term; `kind: rpo` for reward-aware optimization",
    ),
    "center_rewards_coefficient": ForeignName(config=_NOT_OFFERED),
    # --- the reference ---
    "ref_model": ForeignName("reference"),
    "precompute_ref_batch_size": ForeignName(config="use reference_batch_tokens"),
    # --- the model ---
    "model_name_or_path": ForeignName("name_or_path"),
    "lora": ForeignName("peft"),
    "peft_config": ForeignName("peft"),
    "model_init": ForeignName(trainer="pass the model as `model`"),
    "model_init_kwargs": ForeignName(trainer=_IN_CONFIG),
    "trust_remote_code": ForeignName(trainer=_IN_CONFIG),
    "quantization_config": ForeignName(
        config="use model_init_kwargs={'quantization_config': ...}",
        trainer="load the model with it and pass it as `model`",
    ),
    "torch_dtype": ForeignName(config=_LOADED),
    "model_adapter_name": ForeignName(config="pass the model with its adapter active"),
    "ref_adapter_name": ForeignName(config="pass the reference model as `ref_model`"),
    # --- the tokenizer ---
    "reward_processing_class": ForeignName(trainer="use processing_class"),
    "chat_template_path": ForeignName(config=_TEMPLATE),
    "eos_token": ForeignName(config=_TEMPLATE),
    # --- the length of rows ---
    "max_seq_length": ForeignName("max_length", trainer="set max_length in the config"),
    "max_length": ForeignName(trainer=_IN_CONFIG),
    "max_prompt_length": ForeignName(config=_TOGETHER),
    "max_completion_length": ForeignName(config=_TOGETHER),
    "max_target_length": ForeignName(config=_TOGETHER),
    "packing": ForeignName(config=_PACKED, trainer=_PACKED),
    "eval_packing": ForeignName(config=_PACKED),
    "packing_strategy": ForeignName(config=_PACKED),
    # --- the data ---
    "assistant_only_loss": ForeignName(config=_ASSISTANT),
    "completion_only_loss": ForeignName(config=_ASSISTANT),
    "shuffle": ForeignName(
        recipe="set it under `training_args`; by default, each epoch has a new permutation"
    ),
    "shuffle_dataset": ForeignName(
        config="remove it; each epoch has a new permutation unless shuffle=False"
    ),
    "dataset_num_proc": ForeignName(trainer=_PROCESSES),
    "dataset_text_field": ForeignName(config=_ROWS, trainer=_ROWS),
    "dataset_kwargs": ForeignName(config=_NOT_OFFERED),
    "data_collator": ForeignName(
        trainer="remove it; the trainer packs rows itself, and only responses are trained"
    ),
    "formatting_func": ForeignName(
        trainer="map the dataset to rows of `prompt`, `chosen` and `rejected` first"
    ),
    # --- sampling ---
    "rollout_func": ForeignName(trainer="remove it; these trainers do not sample"),
    "reward_funcs": ForeignName(trainer="score rows before training (`rpo-trainer score`)"),
}
# Names of older versions of transformers and TRL
FOREIGN_NAMES |= {
    "overwrite_output_dir": ForeignName(config="remove it; use another output_dir for a new run"),
    "save_safetensors": ForeignName(config="remove it; weights are always saved as safetensors"),
    "group_by_length": ForeignName(
        config="remove it; rows are packed, so that sorting by length has no benefit"
    ),
    "logging_dir": ForeignName(config="remove it; use the environment variable TENSORBOARD_LOGGING_DIR"),
    "no_cuda": ForeignName(config="use use_cpu"),
    "generate_during_eval": ForeignName(config="remove it; sample from the model after training"),
    "label_pad_token_id": ForeignName(config=_PACKED, trainer=_PACKED),
    "padding_value": ForeignName(config=_PACKED, trainer=_PACKED),
    "is_encoder_decoder": ForeignName(config="remove it; models are decoder-only", trainer="remove it"),
    "force_use_ref_model": ForeignName(config="remove it; ref_model is always used if it is passed"),
    "neftune_noise_alpha": ForeignName(trainer=_IN_CONFIG),
    "label_smoothing": ForeignName(trainer=_IN_CONFIG),
    "loss_type": ForeignName(trainer=_IN_CONFIG),
}  # fmt: skip
FOREIGN_LOSSES = {"sigmoid": "dpo"}  # the same loss with another name
RPO_ALPHA = (
    "sft_loss_weight for the SFT term, and RPOTrainer for Reward-aware Preference Optimization"
)
LOSS_SETTINGS = {"sft": "sft_loss_weight"}  # loss of TRL → setting here


def field_of(name: str) -> str:
    """Return the field of a recipe for a foreign name, else the name itself."""
    return (FOREIGN_NAMES[name].field if name in FOREIGN_NAMES else "") or name
