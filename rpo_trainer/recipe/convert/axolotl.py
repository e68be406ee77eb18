"""Convert Axolotl YAML to a recipe of one stage."""

from __future__ import annotations

from pathlib import Path

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.convert.adapters import LoraNames, put_lora
from rpo_trainer.recipe.convert.arguments import (
    LEFT_OUT,
    NOT_NEEDED,
    STAGE,
    Arguments,
    Defaults,
    put_dtype,
    put_eval_fraction,
)
from rpo_trainer.recipe.convert.axolotl_data import convert_sources
from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, reasons
from rpo_trainer.recipe.convert.paths import Paths

_INSTEAD = {
    "kto": "pair a good response with a bad one for each prompt, and use `rl: dpo`",
    "orpo": "use `rl: dpo` with `rpo_alpha`, which needs a reference model",
    "simpo": "use `rl: dpo`; `average_logps: true` in the recipe normalizes by length",
    "grpo": "use an rpo stage with `generate` and `score`, which samples responses and trains on their "
    "rewards",
}
_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
}
_LORA = LoraNames(
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save",
    "peft_use_rslora", "peft_use_dora", default_rank=None, alpha_of_rank=0,
)  # fmt: skip
_DEFAULTS = Defaults(
    learning_rate=None, epochs=1.0, batch_size=1, schedule="cosine", optim="adamw_torch_fused",
    save_steps=None,
)  # fmt: skip
_TEMPLATES = {"chatml": "chatml"}
_NOT_NEEDED = NOT_NEEDED | reasons(
    [
        ("set by the model's config",
         ("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model",
          "is_falcon_derived_model", "is_qwen_derived_model", "tokenizer_use_fast", "tokenizer_legacy",
          "base_model_ignore_patterns")),
        ("every epoch has a new permutation", ("shuffle_merged_datasets", "sample_packing_sequentially",
         "sample_packing_group_size", "sample_packing_bin_size")),
        ("a run stops at a non-finite loss (`on_nonfinite`)",
         ("loss_watchdog_threshold", "loss_watchdog_patience")),
        ("the end of a turn is detected in the chat template", ("eot_tokens",)),
        ("device placement follows from the launcher",
         ("lora_on_cpu", "qlora_sharded_model_loading",
         "low_cpu_mem_usage", "device_map", "gpu_memory_limit", "max_memory")),
        ("torch's kernels are used", ("flash_attn_cross_entropy", "flash_attn_rms_norm",
         "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "unsloth_lora_mlp", "unsloth_lora_qkv",
         "unsloth_lora_o", "cut_cross_entropy", "lora_embedding_kernel")),
        ("to sample responses in an evaluation, use `eval: {data, generate, score}`",
         ("eval_table_size", "eval_max_new_tokens")),
    ]
)  # fmt: skip
_LEFT_OUT = LEFT_OUT | reasons(
    [
        ("merge the adapter into the model first, and use the merged model", ("lora_model_dir",)),
        ("an adapter has one learning rate",
         ("loraplus_lr_ratio", "loraplus_lr_embedding", "lr_groups", "embedding_lr", "embedding_lr_scale")),
        ("prompts are never trained", ("train_on_inputs",)),
        ("set them in the tokenizer's files", ("special_tokens", "tokens", "added_tokens_overrides")),
        ("add it to the rows as a system turn", ("default_system_message",)),
        ("set `save_steps` to the steps of an epoch divided by this", ("saves_per_epoch",)),
        ("set `eval_steps` to the steps of an epoch divided by this", ("evals_per_epoch",)),
        ("set it in the environment of the run (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_ID, ...)",
         ("wandb_entity", "wandb_watch", "wandb_run_id", "wandb_log_model", "wandb_mode")),
        ("weights stay float32 with autocast", ("bfloat16", "float16", "fp8")),
        ("set it in the model's config.json",
         ("overrides_of_model_config", "rope_scaling", "s2_attention", "use_pose")),
        ("ReLoRA, LISA, QAT and distillation are not supported",
         ("relora", "relora_steps", "relora_prune_ratio", "lisa_n_layers", "qat", "quantization",
          "kd_trainer")),
        ("a stage trains all weights or an adapter", ("unfrozen_parameters",)),
        ("length bounds other than `max_length` are not supported", ("min_sample_len", "max_prompt_len")),
        ("other terms of the loss are not supported", ("dpo_use_weighting", "dpo_norm_loss", "orpo_alpha",
         "cpo_alpha", "simpo_gamma", "kto_desirable_weight", "kto_undesirable_weight")),
        ("responses are sampled by `data.generate`, not by vLLM in the trainer", ("trl", "vllm")),
        ("only bitsandbytes' NF4 with its defaults is supported",
         ("bnb_config_kwargs", "gptq", "loftq_config")),
        ("set these fields of `peft.LoraConfig` under `peft`",
         ("peft", "peft_layers_to_transform", "peft_layers_pattern", "peft_init_lora_weights",
          "peft_layer_replication", "lora_fan_in_fan_out", "lora_target_parameters")),
        ("transformers' schedule does not have it; see `lr_scheduler_kwargs` under `training_args`",
         ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup")),
    ]
)  # fmt: skip


def convert_axolotl(config: ForeignConfig, paths: Paths, draft: Draft, devices: int | None) -> None:
    """Fill the draft from an Axolotl config.

    Raises:
        RecipeError: the config is not for training, or its method has no counterpart.
    """
    kind, loss = _kind(config)
    _model(config, paths, draft)
    draft.put((*STAGE, "name"), kind)
    draft.put((*STAGE, "kind"), kind, "rl" if kind == "dpo" else "")
    if kind == "reward":
        draft.put((*STAGE, "objective"), "bradley_terry", "reward_model")
    files = _data(config, paths, draft, kind)
    if kind == "dpo":
        _preference(config, draft, loss)
    source = "sequence_len" if config.has("sequence_len") else "default of Axolotl"
    draft.put((*STAGE, "max_length"), int(config.number("sequence_len", 512)), source)
    strategy = config.take("excess_length_strategy", "drop")
    if strategy == "truncate":
        draft.put((*STAGE, "truncation"), "truncate", "excess_length_strategy")
    elif strategy != "drop":
        config.leave_out(
            "excess_length_strategy", "longer rows are dropped, or truncated (`truncate`)"
        )
    _batch_size(config)
    Arguments(config, draft, STAGE, _DEFAULTS, devices, _NAMES).convert(files, sft=kind == "sft")
    _trackers(config, draft)
    _adapter(config, draft, kind)
    if config.take("dataset_exact_deduplication") is True:
        config.leave_out(
            "dataset_exact_deduplication", "`data.dedup` compares prompts, not entire rows"
        )
    config.skip(_NOT_NEEDED)
    config.leave_out_rest(_LEFT_OUT)


def _kind(config: ForeignConfig) -> tuple[str, str]:
    """Return the kind of stage, and the preference loss of `rl`."""
    rl = config.take("rl")
    if config.has("processor_type"):
        raise config.unsupported(
            "processor_type",
            "training on images, video or audio",
            "use a text model and text rows",
        )
    if config.has("pretraining_dataset"):
        raise config.unsupported(
            "pretraining_dataset", "pretraining",
            "train on the text as SFT rows with `format: text` (`rpo-trainer init --kind sft`)",
        )  # fmt: skip
    if config.take("process_reward_model") is True:
        raise config.unsupported(
            "process_reward_model", "a process reward model", "train on rewards of whole responses"
        )
    if not config.has("datasets"):
        raise RecipeError(
            "this Axolotl config has no `datasets`",
            code="convert.not-a-training-config",
            where=config.where("base_model"),
            why="only configs for training are converted",
            fix="give the config that was used with `axolotl train`",
        )
    if config.take("reward_model") is True:
        return "reward", ""
    if rl is None or rl is False:
        return "sft", ""
    loss = "dpo" if rl is True else str(rl).lower()
    if loss not in ("dpo", "ipo"):
        fix = _INSTEAD.get(loss, "use `rl: dpo` or `ipo`")
        raise config.unsupported("rl", f"`rl: {rl}`", fix)
    return "dpo", loss


def _model(config: ForeignConfig, paths: Paths, draft: Draft) -> None:
    path, known = paths.converted(str(config.take("base_model")))
    draft.put(("model", "name_or_path"), path, "base_model")
    if not known:
        config.differs("base_model", "not found; correct the path")
    named = config.take("base_model_config")
    if named is not None and named != config.data["base_model"]:
        config.leave_out("base_model_config", "the config of the model is used")
    if config.has("tokenizer_config"):
        tokenizer, _ = paths.converted(str(config.take("tokenizer_config")))
        draft.put(("model", "tokenizer"), tokenizer, "tokenizer_config")
    put_dtype(config, draft, "auto", "default of Axolotl")
    for key in ("revision_of_model", "base_model_revision", "model_revision"):
        if config.has(key):
            draft.put(("model", "revision"), str(config.take(key)), key)
    if config.take("trust_remote_code") is True:
        draft.put(
            ("model", "trust_remote_code"), True, "trust_remote_code; remove it unless needed"
        )
    template = config.take("chat_template")
    jinja = config.take("chat_template_jinja")
    if jinja is not None and (file := paths.find(str(jinja)[:200])) is not None:
        draft.put(("model", "chat_template"), paths.of_recipe(file), "chat_template_jinja")
    elif jinja is not None:
        config.leave_out(
            "chat_template_jinja", "save the template to a file, and set `model.chat_template`"
        )
    elif template in _TEMPLATES:
        draft.put(("model", "chat_template"), _TEMPLATES[template], "chat_template")
    elif template is not None and not str(template).startswith("tokenizer_default"):
        config.differs(
            "chat_template",
            "the tokenizer's own chat template is used; compare it with `rpo-trainer check --template "
            f"{path}`, or set `model.chat_template`",
        )


def _data(config: ForeignConfig, paths: Paths, draft: Draft, kind: str) -> list[Path | None]:
    pairs = kind != "sft"
    sources, files = convert_sources(config, "datasets", paths, pairs=pairs)
    draft.put((*STAGE, "data", "train"), sources, "datasets")
    held_out, _ = convert_sources(config, "test_datasets", paths, pairs=pairs)
    if held_out:
        draft.put((*STAGE, "data", "eval"), held_out, "test_datasets")
    put_eval_fraction(config, draft, "val_set_size")
    return files


def _preference(config: ForeignConfig, draft: Draft, loss: str) -> None:
    key = next((key for key in ("rl_beta", "dpo_beta") if config.has(key)), "rl_beta")
    source = key if config.has(key) else "default of Axolotl"
    draft.put((*STAGE, "beta"), float(config.number(key, 0.1)), source)
    if loss == "ipo":
        draft.put((*STAGE, "loss_type"), "ipo", "rl")
        draft.put((*STAGE, "average_logps"), True, "TRL's ipo averages over the tokens")
    if config.number("rpo_alpha", 0.0):
        draft.put((*STAGE, "sft_loss_weight"), float(config.number("rpo_alpha")), "rpo_alpha")
        draft.put((*STAGE, "sft_reduction"), "token_mean", "as in TRL, which Axolotl uses")
    if config.number("dpo_label_smoothing", 0.0):
        smoothing = float(config.number("dpo_label_smoothing"))
        draft.put((*STAGE, "label_smoothing"), smoothing, "dpo_label_smoothing")


def _batch_size(config: ForeignConfig) -> None:
    """`batch_size`, the older name of the accumulated batch."""
    if not config.has("batch_size"):
        return
    if config.has("gradient_accumulation_steps"):
        config.leave_out("batch_size", "`gradient_accumulation_steps` takes precedence")
        return
    total = int(config.number("batch_size"))
    micro = int(config.number("micro_batch_size", 1))
    config.data = {**config.data, "gradient_accumulation_steps": max(total // micro, 1)}


def _trackers(config: ForeignConfig, draft: Draft) -> None:
    trackers = []
    for tracker, keys in {
        "wandb": ("wandb_project", "use_wandb"),
        "mlflow": ("mlflow_experiment_name", "mlflow_tracking_uri", "use_mlflow"),
        "comet_ml": ("comet_project_name", "use_comet"),
        "tensorboard": ("use_tensorboard",),
    }.items():
        used = [key for key in keys if config.take(key) not in (None, False, "")]
        if used:
            trackers.append(tracker)
            named = [key for key in used if not key.startswith("use_")]
            for key in named:
                config.differs(
                    key, "`report_to` names the tracker; set this in the environment of the run"
                )
    if trackers:
        value = trackers if len(trackers) > 1 else trackers[0]
        draft.put((*STAGE, "report_to"), value, "the trackers of the file")
    if config.has("wandb_name"):
        draft.put(
            (*STAGE, "training_args", "run_name"), str(config.take("wandb_name")), "wandb_name"
        )


def _adapter(config: ForeignConfig, draft: Draft, kind: str) -> None:
    adapter = config.take("adapter")
    if adapter is None or adapter == "":
        return
    if adapter not in ("lora", "qlora"):
        raise config.unsupported(
            "adapter", f"`adapter: {adapter}`", "use `adapter: lora` or `qlora`"
        )
    if kind == "reward":
        config.leave_out("adapter", "a reward stage trains all weights")
        return
    put_lora(config, draft, STAGE, _LORA, all_linear="lora_target_linear")
    if config.take("load_in_4bit") is True or adapter == "qlora":
        key = "load_in_4bit" if config.has("load_in_4bit") else "adapter"
        draft.put((*STAGE, "peft", "quantization"), "nf4", key)
