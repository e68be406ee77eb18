"""Which training arguments a config accepts: the tables of settings, and what must agree with what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from rpo_trainer.errors import RecipeError, did_you_mean
from rpo_trainer.trainers.settings import Setting, by_name, defaults_of, refusals
from rpo_trainer.trainers.settings_table import ACCELERATOR, ACCUMULATION, FSDP, TRAINING

# Parts of metric names of which the lowest value is the best, beside those that end with "loss".
_LOWEST_IS_BEST = ("loss/", "rmse/", "calibration/", "gap_error", "saturated", "chosen_falling")


def setting_problems(args: TrainingArguments) -> Iterator[str]:
    """A sentence for each setting of transformers and accelerate that would not act, or act wrongly."""
    yield from refusals(TRAINING, vars(args), defaults_of(TrainingArguments))
    yield from _accelerator_problems(args.accelerator_config)
    yield from _fsdp_problems(args)
    yield from _companion_problems(args)


def require_readable_accelerator_config(given: Any) -> None:
    """Raises RecipeError where transformers could not make an `AcceleratorConfig` of the argument."""
    if isinstance(given, str) and not given.startswith("{"):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"accelerator_config: {given} cannot be read: {error}",
                where="accelerator_config",
                why="accelerate would not be configured as asked",
                fix="give a dict, or the path of a JSON file",
            ) from error
    if isinstance(given, Mapping):
        known = by_name(ACCELERATOR)
        problems = list(_unknown(given, known, "accelerator_config."))
        if problems:
            raise RecipeError(
                "; ".join(problems),
                where="accelerator_config",
                why="accelerate has no such field",
                fix=f"its fields are {', '.join(known)}",
            )


def _accelerator_problems(config: Any) -> Iterator[str]:
    values = config.to_dict()
    prefix = "accelerator_config."
    yield from refusals(ACCELERATOR, values, defaults_of(AcceleratorConfig), prefix)
    kwargs = values.get("gradient_accumulation_kwargs") or {}
    prefix += "gradient_accumulation_kwargs."
    yield from _unknown(kwargs, by_name(ACCUMULATION), prefix)
    yield from refusals(ACCUMULATION, kwargs, defaults_of(GradientAccumulationPlugin), prefix)


def _fsdp_problems(args: TrainingArguments) -> Iterator[str]:
    config = args.fsdp_config
    if not config:
        return
    if not args.fsdp:
        yield "fsdp_config is only read where fsdp is on: write fsdp=True, or remove it"
        return
    if isinstance(config, dict):
        yield from _unknown(config, by_name(FSDP), "fsdp_config.")
        yield from refusals(FSDP, config, {}, "fsdp_config.")


def _unknown(given: Mapping[str, Any], known: Mapping[str, Setting], prefix: str) -> Iterator[str]:
    for name in given:
        if name not in known:
            near = did_you_mean(name, list(known))
            hint = f"did you mean {near}?" if near else "remove it"
            yield f"{prefix}{name} does not exist: {hint}"


def _companion_problems(args: TrainingArguments) -> Iterator[str]:
    """Settings that only act beside another one."""
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        yield (
            f"warmup_steps={args.warmup_steps} has no effect with lr_scheduler_type constant: write "
            "constant_with_warmup"
        )
    if args.gradient_checkpointing_kwargs and not args.gradient_checkpointing:
        yield "gradient_checkpointing_kwargs without gradient checkpointing: turn it on, or remove them"
    if not args.dataloader_num_workers:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                yield f"{name} needs dataloader_num_workers above 0"
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        yield "save_strategy=best needs eval_strategy: no checkpoint would be written"


def lowest_is_best(metric: str) -> bool:
    """Whether of two values of an evaluation's metric the lower one is the better."""
    return metric.endswith("loss") or any(part in metric for part in _LOWEST_IS_BEST)


def bfloat16_by_default(args: TrainingArguments) -> bool:
    """Whether a run that says nothing of its arithmetic has bfloat16: on devices that compute in it.

    TRL turns it on everywhere. On a CPU it saves nothing, and on an older GPU TRL's default is an error.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.fp16 or launched != "no":
        return launched == "bf16" and not args.fp16
    return not args.use_cpu and bool(is_torch_bf16_gpu_available())


def checkpointing_by_default(args: TrainingArguments) -> bool:
    """Whether a run that says nothing of gradient checkpointing has it: not beside FSDP's own."""
    launched = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() in ("1", "true")
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    own = config.get("activation_checkpointing", config.get("fsdp_activation_checkpointing"))
    return not (launched or own)
