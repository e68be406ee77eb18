"""Convert `transformers.TrainingArguments` of LLaMA-Factory, Axolotl and TRL to fields of a stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpo_trainer.recipe.convert.draft import Draft
from rpo_trainer.recipe.convert.foreign_config import ForeignConfig, reasons
from rpo_trainer.recipe.yaml_document import Key

STAGE: Key = ("stages", 0)  # a converted recipe has one stage
_COUNTED_BYTES = 2**30  # the rows of larger files are not counted
# Fields of a stage with the same meaning and name.
_SAME = ("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm")
# Passed to `training_args` of a stage unchanged.
PASSED = (
    "adam_epsilon", "lr_scheduler_kwargs", "optim_args", "tf32", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "ddp_timeout", "per_device_eval_batch_size", "run_name", "logging_first_step", "data_seed",
    "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "full_determinism", "hub_model_id",
    "hub_strategy", "hub_private_repo", "push_to_hub", "torch_compile", "torch_compile_backend",
)  # fmt: skip
_EXTERNAL_OPTIMIZERS = (
    "galore",
    "apollo",
    "lomo",
    "badam",
    "muon",
    "came",
    "dion",
    "optimi",
    "ao_",
)

NOT_NEEDED = reasons(
    [
        ("a stage always trains, and evaluates if it has held-out data",
         ("do_train", "do_eval", "do_predict")),
        ("repeating the command resumes the run",
         ("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir")),
        ("rows are packed without padding if the model supports it",
         ("packing", "neat_packing", "sample_packing", "eval_sample_packing", "eval_packing",
          "padding_free", "packing_strategy", "pad_to_sequence_len", "pad_to_multiple_of",
          "multipack_real_batches", "batch_flattening", "group_by_length")),
        ("the attention implementation is chosen automatically for packed rows",
         ("flash_attn", "flash_attention", "sdp_attention", "xformers_attention", "eager_attention",
          "flex_attention", "attn_implementation")),
        ("the full logits matrix is never built, with or without these kernels",
         ("enable_liger_kernel", "use_liger_kernel", "use_liger", "unsloth_cross_entropy_loss",
          "plugins", "liger_rope", "liger_rms_norm", "liger_glu_activation",
          "liger_fused_linear_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel",
          "lora_o_kernel")),
        ("reference log-probs are always computed once, before training, and cached",
         ("precompute_ref_log_probs", "precompute_ref_batch_size")),
        ("tokenized data is cached by content",
         ("overwrite_cache", "dataset_prepared_path", "tokenized_path", "preprocessing_batch_size",
          "dataset_keep_in_memory")),
        ("the number of processes for tokenization is chosen automatically",
         ("preprocessing_num_workers", "dataset_processes", "dataset_num_proc")),
        ("the report of a run has the loss curves", ("plot_loss", "logging_dir")),
        ("only the columns of the data format are read", ("remove_unused_columns", "strict")),
        ("progress bars are shown in a terminal only", ("disable_tqdm",)),
        ("the launcher sets the rank of each process", ("local_rank", "ddp", "world_size")),
    ]
)  # fmt: skip
LEFT_OUT = reasons(
    [
        ("start the run with `accelerate launch`; `rpo-trainer recipes` lists configurations for "
         "DeepSpeed and FSDP2",
         ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type", "ddp_backend")),
        ("a stage delivers its last weights; to change that, set it under `training_args`, with "
         "`eval_steps` and `save_steps`",
         ("load_best_model_at_end", "metric_for_best_model", "greater_is_better",
          "early_stopping_patience", "early_stopping_steps")),
        ("checkpoints always contain the optimizer state, so that a run can resume", ("save_only_model",)),
        ("datasets are not streamed", ("streaming", "buffer_size")),
        ("8-bit weights are not supported; use `peft: {quantization: nf4}`", ("load_in_8bit",)),
        ("sequence, context and tensor parallelism are not supported",
         ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size",
          "sequence_parallel_size", "sequence_parallel_mode")),
        ("set the token in the environment (HF_TOKEN)", ("hub_token", "hf_hub_token", "hf_use_auth_token")),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """Default values of a tool, where they differ from those of a recipe."""

    learning_rate: float | None
    epochs: float = 3.0
    batch_size: int = 8
    schedule: str = "linear"
    optim: str = "adamw_torch"
    save_steps: int | None = 500
    gradient_checkpointing: bool = False


@dataclass
class Arguments:
    """Convert the training arguments of one file into the fields of its stage.

    Attributes:
        config: the file.
        draft: the new recipe.
        stage: the stage's key.
        defaults: default values of the tool.
        devices: the number of GPUs that the file was used with; None: unknown.
        names: the tool's names of fields of `TrainingArguments`, where they differ.
    """

    config: ForeignConfig
    draft: Draft
    stage: Key
    defaults: Defaults
    devices: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def convert(self, files: list[Path | None], *, sft: bool) -> None:
        """Set all fields.

        Args:
            files: the training files; None for a source whose rows cannot be counted.
            sft: the stage is SFT, which alone supports NEFTune.
        """
        self._batches()
        self._length()
        self._optimizer()
        steps = self._steps(files)
        self._schedule(steps)
        self._saving()
        self._evaluation()
        if steps is not None:
            self._per_epoch(steps[0])
        self._others(sft)

    def _put(self, name: str, value: Any, comment: str = "") -> None:
        self.draft.put((*self.stage, name), value, comment)

    def _name(self, argument: str) -> str:
        return self.names.get(argument, argument)

    def _given(self, argument: str) -> bool:
        return self.config.has(self._name(argument))

    def _number(self, argument: str, default: float | None = None) -> Any:
        return self.config.number(self._name(argument), default)

    def _source(self, argument: str) -> str:
        """Return the comment of a value: its key in the file, or `default of TOOL`."""
        return self._name(argument) if self._given(argument) else f"default of {self.config.tool}"

    def _batches(self) -> None:
        micro = self._number("per_device_train_batch_size", self.defaults.batch_size)
        steps = self.config.take("gradient_accumulation_steps", 1)
        if isinstance(steps, str):  # "auto" of DeepSpeed
            self.config.differs(
                "gradient_accumulation_steps", "assumed to be 1; check `global_batch_size`"
            )
            steps = 1
        devices = self.devices or 1
        name = self._name("per_device_train_batch_size")
        self._put(
            "global_batch_size",
            int(micro) * int(steps) * devices,
            f"{name} {micro} × gradient_accumulation_steps {steps} × {devices} "
            f"device{'s' * (devices > 1)}",
        )
        self._put("micro_batch_size", int(micro), self._source("per_device_train_batch_size"))
        if self.devices is None:
            self.config.differs(
                "gradient_accumulation_steps",
                f"`global_batch_size` is {int(micro) * int(steps)}, which assumes one GPU; for more, "
                "convert with --devices N",
            )  # fmt: skip

    def _length(self) -> None:
        steps = self._number("max_steps")
        if steps is not None and steps > 0:
            self._put("max_steps", int(steps), self._name("max_steps"))
            self.config.take(self._name("num_train_epochs"))
        else:
            epochs = float(self._number("num_train_epochs", self.defaults.epochs))
            self._put("num_train_epochs", epochs, self._source("num_train_epochs"))

    def _optimizer(self) -> None:
        rate = self._number("learning_rate", self.defaults.learning_rate)
        if rate is not None:
            self._put("learning_rate", float(rate), self._source("learning_rate"))
        for name in _SAME:
            if self._given(name):
                self._put(name, float(self._number(name)), self._name(name))
        name = self._name("optim")
        optim = str(self.config.take(name, self.defaults.optim))
        if any(word in optim for word in _EXTERNAL_OPTIMIZERS):
            self.config.leave_out(name, f"`{optim}` is not supported; AdamW is used")
        elif optim != "adamw_torch":
            self._put("optim", optim, self._source("optim"))
        if self.config.take("gradient_checkpointing", self.defaults.gradient_checkpointing):
            self._put("gradient_checkpointing", True, self._source("gradient_checkpointing"))

    def _steps(self, files: list[Path | None]) -> tuple[int, str] | None:
        """Return the optimizer steps of the stage and how they were counted; None if the rows are unknown."""
        draft, stage = self.draft, self.stage
        if (steps := draft.get((*stage, "max_steps"))) is not None:
            return steps, f"of {steps} steps"
        sources = draft.get((*stage, "data", "train"))
        counts = [None if file is None else count_rows(file) for file in files]
        if not counts or None in counts or any("weight" in source for source in sources):
            return None
        limits = [source.get("max_rows", math.inf) for source in sources]
        rows = sum(int(min(count or 0, limit)) for count, limit in zip(counts, limits, strict=True))
        batch, epochs = (
            draft.get((*stage, name)) for name in ("global_batch_size", "num_train_epochs")
        )
        steps = math.ceil(math.ceil(rows / batch) * epochs)
        return steps, f"of about {steps} steps: {rows} rows / {batch} × {epochs:g} epochs"

    def _schedule(self, steps: tuple[int, str] | None) -> None:
        config = self.config
        schedule = str(config.take(self._name("lr_scheduler_type"), self.defaults.schedule))
        warmup, comment = self._warmup(steps)
        if schedule == "constant" and warmup:
            schedule = "constant_with_warmup"
        if schedule in ("rex", "one_cycle"):
            name = self._name("lr_scheduler_type")
            config.leave_out(
                name, f"`{schedule}` is not a schedule of transformers; cosine is used"
            )
            schedule = "cosine"
        self._put("lr_scheduler_type", schedule, self._source("lr_scheduler_type"))
        if warmup:
            self._put("warmup_steps", warmup, comment)

    def _warmup(self, steps: tuple[int, str] | None) -> tuple[int, str]:
        config = self.config
        warmup, ratio = config.number("warmup_steps"), config.number("warmup_ratio")
        if warmup is not None and not 0 < warmup < 1:
            return int(warmup), "warmup_steps"
        key = "warmup_ratio" if warmup is None else "warmup_steps"
        if (ratio := ratio if warmup is None else warmup) is None:
            if config.tool != "Axolotl":
                return 0, ""
            if steps is None:
                config.differs(
                    "warmup_steps",
                    "Axolotl warms up over 3% of the steps (at most 100); this recipe has no warmup",
                )
                return 0, ""
            found = min(int(0.03 * steps[0]), 100)
            return found, f"default of Axolotl: 3% {steps[1]}, at most 100"
        if ratio == 0:
            return 0, ""
        if steps is None:
            config.leave_out(
                key,
                "the rows could not be counted; set `warmup_steps` to this fraction of the steps",
            )
            return 0, ""
        return math.ceil(ratio * steps[0]), f"{key} {ratio:g} {steps[1]}"

    def _saving(self) -> None:
        config = self.config
        strategy = str(config.take("save_strategy", "steps"))
        steps = config.number("save_steps")
        if steps is None and strategy == "steps" and not config.has("saves_per_epoch"):
            steps = self.defaults.save_steps
        if steps is not None and steps >= 1 and strategy == "steps":
            self._put("save_steps", int(steps), self._source("save_steps"))
        elif strategy != "steps" and strategy not in ("no", "False"):
            config.leave_out(
                "save_strategy", "set `save_steps`; there is no other schedule of checkpoints"
            )
        elif steps is not None and 0 < steps < 1:
            config.leave_out("save_steps", "`save_steps` is a number of steps, not a fraction")
        if config.has("save_total_limit"):
            limit = int(config.number("save_total_limit"))
            self._put("save_total_limit", max(limit, 1), "save_total_limit")
        if config.has("logging_steps"):
            logging = config.number("logging_steps")
            self._put("logging_steps", max(int(logging), 1), "logging_steps")

    def _evaluation(self) -> None:
        """Set `eval_steps` if the stage has held-out data."""
        config, data = self.config, (*self.stage, "data")
        key = "evaluation_strategy" if config.has("evaluation_strategy") else "eval_strategy"
        strategy = str(config.take(key, "steps" if config.has("eval_steps") else "no"))
        steps = config.number("eval_steps")
        held_out = self.draft.get((*data, "eval")) or self.draft.get((*data, "eval_fraction"))
        if strategy == "epoch":
            config.leave_out(key, "set `eval_steps`; there is no other schedule of evaluations")
        elif strategy == "steps" and held_out and (steps is None or steps >= 1):
            logging = self.draft.get((*self.stage, "logging_steps")) or 10
            self._put(
                "eval_steps", int(steps or logging), "eval_steps" if steps else "logging_steps"
            )
        elif steps is not None and 0 < steps < 1 and held_out:
            config.leave_out("eval_steps", "`eval_steps` is a number of steps, not a fraction")
        elif steps is not None:
            config.leave_out("eval_steps", "the stage has no held-out data")

    def _per_epoch(self, steps: int) -> None:
        """Set `save_steps` and `eval_steps` from Axolotl's counts per epoch."""
        epochs = self.draft.get((*self.stage, "num_train_epochs"))
        data = (*self.stage, "data")
        held_out = self.draft.get((*data, "eval")) or self.draft.get((*data, "eval_fraction"))
        for key, name in (("saves_per_epoch", "save_steps"), ("evals_per_epoch", "eval_steps")):
            if not self.config.has(key) or epochs is None or self.config.has(name):
                continue
            if name == "eval_steps" and not held_out:
                self.config.leave_out(key, "the stage has no held-out data")
                continue
            each = max(1, round(steps / epochs / self.config.number(key)))
            self._put(
                name, each, f"{key} {self.config.data[key]}: about {steps / epochs:.0f} steps"
            )

    def _others(self, sft: bool) -> None:
        config = self.config
        if config.has("seed"):
            self.draft.put(("seed",), int(config.number("seed")), "seed")
        if config.has("output_dir"):
            self.draft.put(("run_dir",), str(config.take("output_dir")), "output_dir")
            config.differs(
                "output_dir",
                "used as the run directory, relative to the recipe; it must be new or empty",
            )
        trackers = [
            name for name in config.names("report_to") if name not in ("none", "all", "False")
        ]
        if trackers:
            self._put("report_to", trackers if len(trackers) > 1 else trackers[0], "report_to")
        if config.has("neftune_noise_alpha") and sft:
            self._pass("neftune_noise_alpha")
        for name in PASSED:
            if self._given(name) and self.config.data[self._name(name)] is not False:
                self._pass(name)

    def _pass(self, name: str) -> None:
        foreign = self._name(name)
        value = self.config.take(foreign)
        if name in ("adam_epsilon", "neftune_noise_alpha"):
            value = float(self.config.number(foreign))
        self._put_argument(name, value, foreign)

    def _put_argument(self, name: str, value: Any, comment: str) -> None:
        self.draft.put((*self.stage, "training_args", name), value, comment)


def put_eval_fraction(config: ForeignConfig, draft: Draft, key: str) -> None:
    """Convert the size of the held-out part; a number of rows has no counterpart."""
    size = config.number(key, 0.0)
    if 0 < size < 1:
        draft.put((*STAGE, "data", "eval_fraction"), float(size), key)
    elif size >= 1:
        config.leave_out(
            key,
            "a number of rows; set `data.eval_fraction`, a fraction of the prompts, in its place",
        )


def put_dtype(config: ForeignConfig, draft: Draft, default: str, reason: str) -> None:
    """Set `model.dtype` from `bf16` and `fp16`.

    Args:
        config: the file.
        draft: the new recipe.
        default: the dtype if neither is given.
        reason: the comment on the default.
    """
    given = {name: config.take(name) for name in ("bf16", "fp16")}
    if given["bf16"] == "auto":
        draft.put(("model", "dtype"), "auto", "bf16")
    elif given["bf16"] and given["bf16"] != "false":
        draft.put(("model", "dtype"), "bfloat16", "bf16")
    elif given["fp16"]:
        draft.put(("model", "dtype"), "float16", "fp16")
    elif any(config.has(name) for name in given):
        draft.put(("model", "dtype"), "float32", "neither bf16 nor fp16")
    else:
        draft.put(("model", "dtype"), default, reason)


def count_rows(file: Path) -> int | None:
    """Return the number of rows of a JSON or JSON lines file; None if it cannot be counted cheaply."""
    try:
        if not file.is_file() or file.stat().st_size > _COUNTED_BYTES:
            return None
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                return sum(1 for line in lines if line.strip())
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8"))
            return len(rows) if isinstance(rows, list) else None
    except (OSError, ValueError, RecursionError):
        return None
    return None
