"""The training arguments, LoRA config and trainer of a stage, from the recipe."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rpo_trainer.errors import ModelError, Problems, RecipeError, did_you_mean
from rpo_trainer.models.adapter_methods import (
    changes_base,
    require_plain_start,
    require_supported_method,
)
from rpo_trainer.models.quantization import nf4
from rpo_trainer.recipe import (
    ModelSpec,
    PeftSpec,
    Stage,
    fill_from_environment,
)
from rpo_trainer.recipe.rules.forms import NOT_READ
from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.runtime.devices import bfloat16_supported, has_accelerator
from rpo_trainer.runtime.file_errors import UNREADABLE
from rpo_trainer.runtime.files import kind_of_file
from rpo_trainer.stages.hub import check_strategy
from rpo_trainer.trainers import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    RPOConfig,
    RPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rpo_trainer.trainers.argument_checks import require_best_metric
from rpo_trainer.trainers.argument_status import by_name
from rpo_trainer.trainers.argument_table import TRAINING
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.engine import requests_sharding

if TYPE_CHECKING:
    from peft import LoraConfig

    from rpo_trainer.stages.inputs import StageInputs

logger = logging.getLogger(__name__)

StageConfig = SFTConfig | DPOConfig | RPOConfig | RewardConfig

# The config and trainer classes by kind of stage.
_TRAINERS: dict[str, tuple[type[StageConfig], type[BaseTrainer]]] = {
    "sft": (SFTConfig, SFTTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "rpo": (RPOConfig, RPOTrainer),
    "reward": (RewardConfig, RewardTrainer),
}

_FILE_ARGUMENTS = ("deepspeed", "fsdp_config", "accelerator_config")  # may name a JSON file


# Stage fields that `training_config` converts, although the config has a field of the same name.
_CONVERTED = {
    "num_train_epochs", "max_steps", "save_steps", "eval_steps", "seed", "gradient_checkpointing",
}  # fmt: skip


def copied_fields(kind: str) -> set[str]:
    """Return the fields of a kind of stage that are copied to its config unchanged."""
    config, _ = _TRAINERS[kind]
    return {*STAGE_KINDS[kind].model_fields} & _parameters(config) - _CONVERTED


def _parameters(config: type[StageConfig]) -> set[str]:
    """Return the arguments of a config class, without `derived`, which it sets itself."""
    return set(inspect.signature(config).parameters) - {"derived"}


def arithmetic(model: ModelSpec) -> str:
    """Return the dtype of computation; `auto` is bfloat16 on GPUs that support it, else float32."""
    if model.dtype != "auto":
        return model.dtype
    return "bfloat16" if bfloat16_supported() else "float32"


def frozen_dtype(stage: Stage, model: ModelSpec) -> torch.dtype:
    """Return the dtype of the frozen base weights of a stage; float32 if it trains all weights."""
    if stage.peft is None or stage.peft.frozen_dtype == "float32":
        return torch.float32
    dtype: torch.dtype = getattr(torch, arithmetic(model))
    return dtype


def training_config(
    stage: Stage, model: ModelSpec, *, seed: int, folder: Path, run_dir: Path
) -> StageConfig:
    """Return the trainer config of a stage.

    Raises:
        RecipeError: a name or value that transformers does not accept, in `training_args` or elsewhere, or
            a tracker that is not installed.
    """
    settings: dict[str, Any] = {name: getattr(stage, name) for name in copied_fields(stage.kind)}
    if settings.get("reward_scale") == "auto":
        del settings["reward_scale"]  # not known before the data is read, see `fitted_stage`
    settings |= {
        "output_dir": str(folder),
        "per_device_train_batch_size": stage.micro_batch_size,
        "per_device_eval_batch_size": stage.micro_batch_size,
        "num_train_epochs": stage.num_train_epochs or 1.0,
        "max_steps": stage.max_steps or -1,
        "save_strategy": "steps" if stage.save_steps else "no",
        "save_steps": stage.save_steps or 500,
        "seed": seed,
        "bf16": arithmetic(model) == "bfloat16",
        "fp16": arithmetic(model) == "float16",
        "use_cpu": not has_accelerator() and not requests_sharding(stage.training_args),
        "disable_tqdm": True,
        "log_level": "warning",
        "logging_nan_inf_filter": False,
    }
    if (stage.data.eval or stage.data.eval_fraction) and stage.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": stage.eval_steps}
    if stage.needs_reference:
        settings["reference_cache_dir"] = str(run_dir / "reference-cache")
    where = f"stages.{stage.name}.training_args"
    arguments = fill_from_environment(stage.training_args, where=where)
    check_strategy(arguments, where)
    _check_files(arguments, where)
    # The chain pushes outputs itself, with their model cards: see `push_output`.
    settings |= {**arguments, "push_to_hub": False}
    config, trainer_class = _TRAINERS[stage.kind]
    known = _parameters(config)
    settings["gradient_checkpointing"] = stage.gradient_checkpointing
    problems = [
        RecipeError(
            f"transformers has no training argument {name}",
            code="recipe.unknown-training-argument",
            where=f"{where}.{name}",
            why=NOT_READ,
            fix=_or_see(did_you_mean(name, sorted(known)), "transformers.TrainingArguments"),
        )
        for name in sorted(set(settings) - known)
    ]
    problems += _unknown_names(stage)
    problems += [
        RecipeError(
            f"`{name}` cannot be set in a recipe",
            code="recipe.reserved-training-argument",
            where=f"{where}.{name}",
            why=row.recipe.partition(": ")[0],
            fix=row.recipe.partition(": ")[2],
        )
        for name, row in by_name(TRAINING).items()
        if row.recipe and arguments.get(name)
    ]
    if problems:
        raise Problems(problems)
    try:
        args = config(**settings)
    except RecipeError as error:
        _, _, field = (error.where or "").partition(".")
        raise error.at(f"stages.{stage.name}" + (f".{field}" if field else "")) from None
    except (RuntimeError, *UNREADABLE) as error:  # including errors in a JSON file
        raise RecipeError(
            str(error) or type(error).__name__,
            code="recipe.bad-training-arguments",
            where=f"stages.{stage.name}",
            why="transformers does not accept this combination of arguments, or not on this machine",
            fix="see transformers.TrainingArguments for the accepted values",
        ) from error
    args.compared_with_trl = False  # type: ignore[misc]  # recipes do not have TRL's defaults
    try:
        if stage.data.eval or stage.data.eval_fraction:
            require_best_metric(args, {None: trainer_class.metric_names(args)})
    except RecipeError as error:
        raise error.at(f"{where}.{error.where}") from None
    try:
        trackers: Any = get_reporting_integration_callbacks
        for tracker in trackers(args.report_to):
            tracker()  # raises now, not when training starts, if it is not installed
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(
            f"a tracker of `report_to` cannot start: {error}",
            code="recipe.tracker-cannot-start",
            where=f"stages.{stage.name}.report_to",
            fix="install its package, or remove it from `report_to`; metrics.jsonl always has all metrics",
        ) from error
    return args


def named_files(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the `training_args` that name a JSON file, with the name; text that begins with `{` is JSON."""
    for name in _FILE_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, str) and not value.startswith("{"):
            yield name, value


def _check_files(arguments: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError if an argument names a pipe, a device or the like as a JSON file."""
    for name, file in named_files(arguments):
        if kind := kind_of_file(Path(file).expanduser()):
            raise RecipeError(
                f"this is {kind}, not a file",
                code="recipe.not-a-file",
                where=f"{where}.{name}: {file}",
                why="reading it could block forever",
                fix="give a JSON file, or its content",
            )


def _unknown_names(stage: Stage) -> Iterator[RecipeError]:
    for field, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        known = [str(name.value) for name in names]
        if (value := getattr(stage, field)) not in known:
            yield RecipeError(
                f"transformers has no {field} {value}",
                code="recipe.unknown-name",
                where=f"stages.{stage.name}.{field}",
                fix=_or_see(did_you_mean(value, known), "transformers.TrainingArguments"),
            )


def _or_see(near: str | None, place: str) -> str:
    return f"did you mean {near}?" if near else f"see {place} for the names"


def steps_of(stage: Stage, examples: int) -> int:
    """Return the number of optimizer steps of a stage."""
    if stage.max_steps is not None:
        return stage.max_steps
    per_epoch = -(-examples // stage.global_batch_size)
    return int(-(-per_epoch * (stage.num_train_epochs or 1.0) // 1))


def check_warmup(stage: Stage, examples: int) -> None:
    """Raise RecipeError if the warmup is longer than the stage."""
    steps = steps_of(stage, examples)
    if stage.warmup_steps > steps:
        raise RecipeError(
            f"`warmup_steps` is {stage.warmup_steps}, but the stage has only {steps} steps",
            code="recipe.warmup-too-long",
            where=f"stages.{stage.name}.warmup_steps",
            why="the learning rate would never reach its peak",
            fix=f"set it to at most {steps}, or increase `num_train_epochs`",
        )


def lora_config(stage: Stage) -> LoraConfig | None:
    """Return the LoRA config of a stage; None: it trains all weights.

    Raises:
        RecipeError: a field or value of `peft` that LoraConfig does not accept, or an adapter that is not
            supported.
    """
    if stage.peft is None:
        return None
    from peft import LoraConfig

    where = f"stages.{stage.name}.peft"
    fields = {"task_type": "CAUSAL_LM", **stage.peft.lora_fields()}
    _require_lora(str(fields.pop("peft_type", "LORA")).upper(), where)
    known = set(inspect.signature(LoraConfig).parameters)
    for name in fields:
        if name not in known:
            near = did_you_mean(name, [*known, *PeftSpec.model_fields])
            raise RecipeError(
                f"LoraConfig has no field {name}",
                code="recipe.unknown-peft-field",
                where=f"{where}.{name}",
                why=NOT_READ,
                fix=_or_see(near, "peft.LoraConfig"),
            )
    try:
        config = LoraConfig(**fields)
        require_supported_method(config)
        require_plain_start(config)
        if stage.peft.quantization is not None:
            nf4(torch.float32)
    except ModelError as error:
        raise RecipeError(
            error.what, code=error.code, where=where, why=error.why, fix=error.fix
        ) from error
    except RecipeError as error:
        raise error.at(f"{where}.{error.where}") from None
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(
            str(error), code="recipe.bad-peft", where=where, fix="see peft.LoraConfig"
        ) from error
    if stage.peft.quantization is not None and changes_base(config):
        raise RecipeError(
            f"init_lora_weights: {config.init_lora_weights} changes the base weights, which are quantized "
            "to 4 bits",
            code="recipe.quantized-base-changes",
            where=where,
            why="the change would be lost by rounding",
            fix="remove init_lora_weights or quantization",
        )
    return config


def _require_lora(kind: str, where: str) -> None:
    from peft import LoraConfig
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind == "LORA":
        return
    methods = {str(name.value): method for name, method in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    prompt = issubclass(methods.get(kind, LoraConfig), PromptLearningConfig)
    raise RecipeError(
        f"peft_type {kind} is not supported in a recipe",
        code="recipe.unsupported-peft-type",
        where=where,
        why="the virtual tokens of prompt learning precede a row, and a packed row holds several examples"
        if prompt
        else "stages pass on LoRA adapters only",
        fix="remove peft_type" + ("" if prompt else ", or use a trainer with peft_config in Python"),
    )  # fmt: skip


def make_trainer(
    stage: Stage,
    config: StageConfig,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    inputs: StageInputs,
    callbacks: list[TrainerCallback],
) -> BaseTrainer:
    """Create the trainer of a stage."""
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": inputs.train,
        "eval_dataset": inputs.held_out and inputs.held_out.examples,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if stage.needs_reference:
        common["ref_model"] = reference
    _, trainer_class = _TRAINERS[stage.kind]
    trainer = trainer_class(**common)
    trainer.remove_callback(PrinterCallback)
    return trainer
