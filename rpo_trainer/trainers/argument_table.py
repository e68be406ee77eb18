"""The settings of `TrainingArguments`, `accelerator_config` and `fsdp_config`, field by field.

Each row was checked against transformers' `trainer.py` and `training_args.py`, and against the methods that
our trainers override: data loaders, loss, evaluation and checkpoints.
"""

from __future__ import annotations

from rpo_trainer.trainers.argument_status import Setting, harmless, read, refused

_NO_PREDICTIONS = "metrics come from log-probs, without logits, labels or `compute_metrics`"
_OWN_LOADER = "the trainer creates its own data loaders, which accelerate does not prepare"
_METRICS = "the loss and its metrics are logged; for other metrics subclass the trainer and extend `evaluate`"
_HUB = "transformers: used with `push_to_hub`"

TRAINING: tuple[Setting, ...] = (
    # --- batch and length ---
    read("output_dir", "checkpoints, and the reference cache of a preference trainer"),
    read(
        "per_device_train_batch_size",
        "examples per forward and process; `micro_batch_tokens` replaces it, by default with FSDP, ZeRO-2 "
        "and ZeRO-3",
    ),
    read(
        "gradient_accumulation_steps",
        "forwards per optimizer step; if `global_batch_size` is set it follows from that, and must agree",
    ),
    read("num_train_epochs max_steps", "transformers: length of training"),
    refused(
        "auto_find_batch_size",
        "it would halve per_device_train_batch_size when memory runs out, and with it the global batch",
        "set micro_batch_tokens, or a smaller per_device_train_batch_size together with global_batch_size; "
        "neither changes the updates (`rpo-trainer plan` shows what fits)",
    ),
    # --- optimizer ---
    read(
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps",
        "transformers: the schedule; `constant` with `warmup_steps` is refused, because it has no warmup",
    ),
    read(
        "optim",
        "transformers: the optimizer",
        not_taken=(
            "lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise", "apollo_adamw_layerwise",
        ),
        instead="these update weights during the backward pass, before gradients are accumulated and "
        "checked; use adamw_torch, adafactor, galore_adamw, apollo_adamw or an 8-bit optimizer",
    ),
    read(
        "optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon",
        "transformers: the optimizer",
    ),
    read("max_grad_norm", "transformers or DeepSpeed: gradient clipping; 0: none"),
    # --- loss ---
    refused(
        "label_smoothing_factor",
        "it belongs to the cross-entropy of transformers, which is not computed here",
        "use label_smoothing of DPOConfig for cDPO; SFT and reward models have none",
    ),
    refused(
        "average_tokens_across_devices",
        "a loss over tokens is always divided by the tokens of the entire global batch, so that the number "
        "of processes does not change the update",
        "remove it",
        True,
    ),
    read(
        "neftune_noise_alpha",
        "SFT: noise on the embeddings, scaled by the length of each example as in the paper, in every "
        "layout; refused by DPO, RPO and reward models",
    ),
    # --- arithmetic ---
    read("bf16 fp16", "accelerate: autocast of every forward; weights keep their dtype"),
    refused(
        "bf16_full_eval fp16_full_eval",
        "transformers casts the weights for an evaluation and does not cast them back, so that rounded "
        "weights are trained and saved",
        "remove it; with bf16 or fp16 evaluation uses the same autocast as training",
    ),
    read("tf32", "transformers: TF32 matrix products on CUDA"),
    read(
        "activation_checkpointing activation_checkpointing_kwargs",
        "transformers: activations are recomputed in the backward pass",
        some_versions=True,
    ),
    read(
        "gradient_checkpointing gradient_checkpointing_kwargs",
        "older names of `activation_checkpointing` and its kwargs",
    ),
    read(
        "torch_compile torch_compile_backend torch_compile_mode",
        "decoder layers are compiled one by one; modes that record CUDA graphs are refused",
    ),
    harmless(
        "use_liger_kernel",
        "the loss never holds all logits in memory, with or without it; Liger's kernels for layers are not "
        "installed, and a warning says so",
    ),
    refused(
        "liger_kernel_config",
        "Liger's kernels are not installed: the packed layout is checked, and the reference log-probs are "
        "computed, without them",
        "remove it",
    ),
    refused(
        "use_cache",
        "training and evaluation never use a key-value cache",
        "remove it; for generation set it in the model's generation_config",
    ),
    read("torch_empty_cache_steps", "transformers: number of steps after which the device cache is emptied"),
    # --- log ---
    read(
        "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
        "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id",
        "transformers: what is logged, when, and to which tracker",
    ),
    refused(
        "logging_nan_inf_filter",
        "it would hide losses that are not finite",
        "remove it; `on_nonfinite` determines whether such a step stops the run or is skipped",
        False,
    ),
    read(
        "include_num_input_tokens_seen",
        "`all`: tokens of every training forward over all processes, with padding and fillers; "
        "`non_padding`: without them. A shared prompt counts once (`num_tokens` counts it once per response)",
    ),
    # --- evaluation ---
    read(
        "eval_strategy eval_steps eval_delay eval_on_start",
        "transformers: when evaluation runs",
    ),
    read("per_device_eval_batch_size", "examples per forward and process in evaluation"),
    harmless("prediction_loss_only", "predictions are never kept; " + _NO_PREDICTIONS),
    harmless(
        "eval_accumulation_steps",
        "an evaluation only keeps one loss per example; the setting changes where it is kept",
    ),
    refused("eval_do_concat_batches eval_use_gather_object", _NO_PREDICTIONS, "remove it"),
    refused("include_for_metrics batch_eval_metrics", _NO_PREDICTIONS, _METRICS),
    refused("label_names", "the loss reads no column of labels; " + _NO_PREDICTIONS, "remove it"),
    # --- checkpoints ---
    read("save_strategy save_steps save_total_limit", "when checkpoints are saved, and how many are kept"),
    read("save_on_each_node", "transformers: which processes save"),
    read(
        "save_only_model",
        "checkpoints without optimizer, schedule and RNG state; resuming from one is refused",
        recipe="a stopped run could not resume exactly; remove it (outputs of stages never contain optimizer "
        "state)",
    ),
    refused(
        "enable_jit_checkpoint",
        "it saves in the middle of a step, where an exact resume is not possible, and each process saves at "
        "a different time",
        "remove it; on SIGTERM a run of a recipe finishes the step and saves; in a script set "
        "control.should_save and control.should_training_stop in a callback's on_step_end",
    ),
    refused(
        "ignore_data_skip",
        "a resumed run would train on different examples",
        "remove it; skipping takes no time, because only indices are skipped",
    ),
    read(
        "restore_callback_states_from_checkpoint",
        "transformers: state of callbacks such as EarlyStoppingCallback",
    ),
    read(
        "resume_from_checkpoint",
        "the checkpoint that `train()` resumes from, unless its argument names one",
        recipe="a run of a recipe resumes from its last complete checkpoint automatically; remove it",
    ),
    read(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        "transformers: which checkpoint is the best. The metric must be one of the evaluation; with several "
        "eval sets its name includes the set (`eval_NAME_loss`). For losses and errors lower is better",
    ),
    # --- hub ---
    read(
        "push_to_hub",
        "transformers: pushes complete checkpoints; a recipe pushes the output of each finished stage",
    ),
    read("hub_token hub_private_repo hub_model_id hub_revision hub_strategy hub_always_push", _HUB),
    # --- randomness and device ---
    read("seed data_seed", "order of the data, new weights, dropout"),
    read("full_determinism", "transformers: deterministic kernels; an error where there is none"),
    read("use_cpu", "transformers: device"),
    # --- data ---
    read(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
        "data loaders of training and evaluation",
    ),
    refused(
        "dataloader_in_order",
        "batches out of order would mix examples of different optimizer steps and prevent an exact resume",
        "remove it",
    ),
    refused(
        "remove_unused_columns",
        "the collator selects the columns",
        "remove it",
        False,
    ),
    Setting(
        ("train_sampling_strategy",),
        "refused",
        "rows are packed without padding and balanced by length within each optimizer step, so that sorting "
        "by length saves nothing and would change which examples are in a step",
        "use `random` (a new permutation each epoch) or `sequential` (the order of the data)",
        taken=("random", "sequential"),
    ),
    refused("length_column_name", "lengths are computed, not read from a column", "remove it"),
    # --- several processes ---
    read("accelerator_config", "see the table of its fields below"),
    refused(
        "parallelism_config",
        "each process trains on its own examples; tensor, context and sequence parallelism split examples "
        "between processes",
        "use DDP, FSDP2 or DeepSpeed ZeRO",
    ),
    read(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ddp_timeout",
        "transformers and DDP; `ddp_find_unused_parameters` defaults to True if a step may not use a weight",
    ),
    read("fsdp fsdp_config", "FSDP2; see the table of its fields below"),
    read("deepspeed", "DeepSpeed ZeRO 0 to 3; not in float16"),
    # --- the rest ---
    read(
        "debug",
        "transformers: `underflow_overflow` watches activations",
        not_taken=("tpu_metrics_debug",),
        instead="TPUs are not supported; remove it",
    ),
    read("skip_memory_metrics", "transformers: `false` adds memory metrics"),
    harmless(
        "do_train do_eval do_predict",
        "flags for the example scripts of transformers, which no trainer reads; see `eval_strategy`",
    ),
    harmless("local_rank", "the environment of the launcher determines the rank"),
)  # fmt: skip

ACCELERATOR: tuple[Setting, ...] = (
    refused(
        "split_batches",
        f"it splits each batch between processes, but {_OWN_LOADER}",
        "set per_device_train_batch_size or global_batch_size",
    ),
    refused("dispatch_batches", _OWN_LOADER, "remove it", None, False),
    refused(
        "even_batches",
        "all processes run the same number of forwards; one without examples gets a filler of weight 0",
        "remove it, or set dataloader_drop_last",
    ),
    refused(
        "use_seedable_sampler",
        "the order of the data only depends on seed and epoch",
        "remove it; data_seed changes the order",
    ),
    harmless("non_blocking", "batches are always moved to the device without blocking, from pinned memory"),
    read("gradient_accumulation_kwargs", "see the table of its keys below"),
    read("use_configured_state", "transformers: reuses an existing state of accelerate"),
)  # fmt: skip

ACCUMULATION: tuple[Setting, ...] = (
    refused(
        "num_steps",
        "it would multiply the global batch",
        "set global_batch_size or gradient_accumulation_steps",
        1,
    ),
    read(
        "sync_each_batch",
        "gradients are reduced after every forward instead of once per optimizer step",
    ),
    refused(
        "adjust_scheduler sync_with_dataloader",
        "they belong to the gradient accumulation of accelerate, which is not used",
        "remove it",
        True,
    ),
)

FSDP: tuple[Setting, ...] = (
    read("version", "only 2: FSDP 1 flattens weights that the head needs unflattened"),
    read(
        "reshard_after_forward cpu_offload auto_wrap_policy transformer_layer_cls_to_wrap min_num_params "
        "activation_checkpointing cpu_ram_efficient_loading state_dict_type",
        "accelerate's FSDP2",
    ),
    refused(
        "xla xla_fsdp_v2 xla_fsdp_grad_ckpt",
        "TPUs are not supported",
        "remove it",
        False,
    ),
    refused("xla_fsdp_settings", "TPUs are not supported", "remove it", None, {}),
    refused(
        "forward_prefetch backward_prefetch use_orig_params sync_module_states limit_all_gathers",
        "it is a setting of FSDP 1",
        "remove it",
        None,
    ),
)
