"""The settings of `TrainingArguments`, `accelerator_config` and `fsdp_config`, field by field.

Each row was checked against transformers' `trainer.py` and `training_args.py` and against what our trainers
override: the data loaders, the loss, evaluation, and the writing of checkpoints.
"""

from __future__ import annotations

from rpo_trainer.trainers.argument_status import Setting, harmless, read, refused

_NO_PREDICTIONS = "metrics come from log-probabilities, without logits, labels or `compute_metrics`"
_OWN_LOADER = "the trainer makes its own data loaders, which accelerate does not prepare"
_METRICS = (
    "the loss and its metrics are in the log; for others subclass the trainer, extend `evaluate`"
)
_HUB = "transformers, where `push_to_hub` is on"

TRAINING: tuple[Setting, ...] = (
    # --- batch and length ---
    read("output_dir", "checkpoints, and the reference cache of a preference trainer"),
    read(
        "per_device_train_batch_size",
        "examples of one forward of a process; `micro_batch_tokens` takes its place",
    ),
    read(
        "gradient_accumulation_steps",
        "forwards of an optimizer step; follows from `global_batch_size` where that is set, and must then "
        "agree with it",
    ),
    read("num_train_epochs max_steps", "transformers: the length of training"),
    refused(
        "auto_find_batch_size",
        "it would halve per_device_train_batch_size when memory runs out, and with it the global batch",
        "set micro_batch_tokens or a smaller per_device_train_batch_size with global_batch_size, which "
        "change no update (`rpo-trainer plan` says what fits)",
    ),
    # --- optimizer ---
    read(
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps",
        "transformers: the schedule; `constant` with `warmup_steps` is refused, as it has no warm-up",
    ),
    read(
        "optim",
        "transformers: the optimizer",
        not_taken=(
            "lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise", "apollo_adamw_layerwise",
        ),
        instead="these move the weights within the backward pass, before gradients are accumulated and "
        "checked: write adamw_torch, adafactor, galore_adamw, apollo_adamw or an 8-bit optimizer",
    ),
    read(
        "optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon",
        "transformers: the optimizer",
    ),
    read("max_grad_norm", "transformers, or DeepSpeed: gradient clipping; 0: none"),
    # --- loss ---
    refused(
        "label_smoothing_factor",
        "transformers smooths the labels of its own cross-entropy, which is not computed here",
        "use label_smoothing of DPOConfig for cDPO; there is none for SFT and reward models",
    ),
    refused(
        "average_tokens_across_devices",
        "a loss over tokens is always divided by the tokens of the whole global batch, so that the number of "
        "processes does not change the update",
        "remove it",
        True,
    ),
    read(
        "neftune_noise_alpha",
        "SFT: noise on the embeddings, scaled by the length of each example as in the paper, packed or not. "
        "DPO, RPO and reward models refuse it",
    ),
    # --- arithmetic ---
    read("bf16 fp16", "accelerate: autocast of every forward; the weights stay as they are loaded"),
    refused(
        "bf16_full_eval fp16_full_eval",
        "transformers casts the weights for an evaluation and leaves them so, so that rounded weights are "
        "trained on and written",
        "remove it: with bf16 or fp16 an evaluation has the same arithmetic as training",
    ),
    read("tf32", "transformers: TF32 matrix products on CUDA"),
    read(
        "activation_checkpointing activation_checkpointing_kwargs",
        "transformers: activations are recomputed in the backward pass",
        some_versions=True,
    ),
    read(
        "gradient_checkpointing gradient_checkpointing_kwargs",
        "the older names of `activation_checkpointing` and its kwargs",
    ),
    read(
        "torch_compile torch_compile_backend torch_compile_mode",
        "the decoder's layers are compiled one by one; modes that record CUDA graphs are refused",
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
        "training and evaluation never keep a key-value cache",
        "remove it; for generation set it in the model's generation_config",
    ),
    read("torch_empty_cache_steps", "transformers: empties the cache of the device every so many steps"),
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
        "remove it: `on_nonfinite` says whether such a step stops the run or is left out",
        False,
    ),
    read(
        "include_num_input_tokens_seen",
        "`all`: tokens of every training forward over all processes, padding and fillers included; "
        "`non_padding`: without them. A prompt that several responses share counts once",
    ),
    # --- evaluation ---
    read(
        "eval_strategy eval_steps eval_delay eval_on_start",
        "transformers: when the eval data is evaluated",
    ),
    read("per_device_eval_batch_size", "examples of one forward of a process in evaluation"),
    harmless("prediction_loss_only", "predictions are never kept: " + _NO_PREDICTIONS),
    harmless(
        "eval_accumulation_steps",
        "one loss for each example is all that an evaluation keeps; it changes where that is kept",
    ),
    refused("eval_do_concat_batches eval_use_gather_object", _NO_PREDICTIONS, "remove it"),
    refused("include_for_metrics batch_eval_metrics", _NO_PREDICTIONS, _METRICS),
    refused("label_names", "the loss reads no labels column: " + _NO_PREDICTIONS, "remove it"),
    # --- checkpoints ---
    read("save_strategy save_steps save_total_limit", "when checkpoints are written, and how many are kept"),
    read("save_on_each_node", "transformers: which processes write"),
    read(
        "save_only_model",
        "checkpoints without optimizer, schedule and random state; resuming from one is refused",
        recipe="a run that is stopped could not resume exactly: remove it (the outputs of stages have no "
        "optimizer state in any case)",
    ),
    refused(
        "enable_jit_checkpoint",
        "it saves in the middle of a step, at which an exact resume is not possible, and each process saves "
        "at a time of its own",
        "remove it: a recipe's run that gets SIGTERM finishes the step and saves; in a script set "
        "control.should_save and control.should_training_stop in a callback's on_step_end",
    ),
    refused(
        "ignore_data_skip",
        "a resumed run would train on other examples than the run that was stopped",
        "remove it: skipping costs no time, as only example numbers are skipped",
    ),
    read(
        "restore_callback_states_from_checkpoint",
        "transformers: state of callbacks such as EarlyStoppingCallback",
    ),
    read(
        "resume_from_checkpoint",
        "the checkpoint that `train()` resumes from, where its own argument is not given",
        recipe="a recipe's run resumes from its last complete checkpoint by itself: remove it",
    ),
    read(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        "transformers: which checkpoint is the best. The metric must be one of the evaluation, for several "
        "eval sets with the name of one (`eval_NAME_loss`); of losses and errors the lowest is the best",
    ),
    # --- hub ---
    read(
        "push_to_hub",
        "transformers, when a checkpoint is complete; a recipe pushes the output of a finished stage",
    ),
    read("hub_token hub_private_repo hub_model_id hub_revision hub_strategy hub_always_push", _HUB),
    # --- randomness and device ---
    read("seed data_seed", "the order of the data, new weights, dropout"),
    read("full_determinism", "transformers: deterministic kernels, or an error where there are none"),
    read("use_cpu", "transformers: the device"),
    # --- data ---
    read(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context",
        "the data loaders of training and evaluation",
    ),
    refused(
        "dataloader_in_order",
        "batches out of order would mix the examples of different optimizer steps, and no resume would be "
        "exact",
        "remove it",
    ),
    refused(
        "remove_unused_columns",
        "the collator reads the columns itself",
        "remove it",
        False,
    ),
    Setting(
        ("train_sampling_strategy",),
        "refused",
        "rows are packed without padding and assigned to forwards by length within each optimizer step, so "
        "that sorting by length saves nothing and would change which examples are in a step",
        "write `random` (a new permutation in each epoch) or `sequential` (the order of the data)",
        taken=("random", "sequential"),
    ),
    refused("length_column_name", "lengths are counted, no column is read for them", "remove it"),
    # --- several processes ---
    read("accelerator_config", "see the table of its fields below"),
    refused(
        "parallelism_config",
        "every process trains on examples of its own; tensor, context and sequence parallelism would give "
        "parts of one example to several",
        "use DDP, FSDP2 or DeepSpeed ZeRO",
    ),
    read(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ddp_timeout",
        "transformers and DDP; `ddp_find_unused_parameters` left out: on where a step may leave a weight out",
    ),
    read("fsdp fsdp_config", "FSDP2; see the table of its fields below"),
    read("deepspeed", "DeepSpeed ZeRO 0 to 3, not in float16"),
    # --- the rest ---
    read(
        "debug",
        "transformers: `underflow_overflow` watches activations",
        not_taken=("tpu_metrics_debug",),
        instead="there is no support for TPUs: remove it",
    ),
    read("skip_memory_metrics", "transformers: `false` adds memory figures to the metrics"),
    harmless(
        "do_train do_eval do_predict",
        "switches of transformers' example scripts, which no trainer reads; `evaluate()` and `eval_strategy` "
        "evaluate",
    ),
    harmless("local_rank", "the launcher's environment says which process this is"),
)  # fmt: skip

ACCELERATOR: tuple[Setting, ...] = (
    refused(
        "split_batches",
        f"it would divide each batch by the number of processes, but {_OWN_LOADER}",
        "set per_device_train_batch_size or global_batch_size",
    ),
    refused("dispatch_batches", _OWN_LOADER, "remove it", None, False),
    refused(
        "even_batches",
        "every process always has the same number of forwards; one without examples gets a filler of "
        "weight 0",
        "remove it, or set dataloader_drop_last",
    ),
    refused(
        "use_seedable_sampler",
        "the order of the data is always a function of seed and epoch",
        "remove it; data_seed gives another order",
    ),
    harmless("non_blocking", "batches always move to the device without blocking, from pinned memory"),
    read("gradient_accumulation_kwargs", "see the table of its keys below"),
    read("use_configured_state", "transformers: takes over a state of accelerate that exists already"),
)  # fmt: skip

ACCUMULATION: tuple[Setting, ...] = (
    refused(
        "num_steps",
        "it would multiply the global batch",
        "set global_batch_size or gradient_accumulation_steps",
        1,
    ),
    read(
        "sync_each_batch", "gradients are reduced after every forward, not once an optimizer step"
    ),
    refused(
        "adjust_scheduler sync_with_dataloader",
        "they belong to accelerate's own accumulation, which is not used",
        "remove it",
        True,
    ),
)

FSDP: tuple[Setting, ...] = (
    read("version", "2 alone: FSDP 1 flattens weights that the head needs whole"),
    read(
        "reshard_after_forward cpu_offload auto_wrap_policy transformer_layer_cls_to_wrap min_num_params "
        "activation_checkpointing cpu_ram_efficient_loading state_dict_type",
        "accelerate's FSDP2",
    ),
    refused(
        "xla xla_fsdp_v2 xla_fsdp_grad_ckpt",
        "there is no support for TPUs",
        "remove it",
        False,
    ),
    refused("xla_fsdp_settings", "there is no support for TPUs", "remove it", None, {}),
    refused(
        "forward_prefetch backward_prefetch use_orig_params sync_module_states limit_all_gathers",
        "it is a setting of FSDP 1, which FSDP2 does not have",
        "remove it",
        None,
    ),
)
