"""Checks of training arguments: against the tables of settings, and against each other."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from rpo_trainer.errors import RecipeError, did_you_mean
from rpo_trainer.trainers.argument_status import Problem, Setting, by_name, defaults_of, refusals
from rpo_trainer.trainers.argument_table import ACCELERATOR, ACCUMULATION, FSDP, TRAINING

_FILES = ("accelerator_config", "fsdp_config")  # may be the path of a JSON file
# cannot be the path of a file
_DICTS = (
    "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "lr_scheduler_kwargs", "derived",
    "model_init_kwargs", "dataset_kwargs",
)  # fmt: skip
_SHOWN = 100  # characters of a value in a message
# Metrics that transformers adds to an evaluation
_SPEED = ("runtime", "samples_per_second", "steps_per_second")
_MEMORY = "mem_"  # prefix of its memory metrics, with `skip_memory_metrics=False`
# Parts of names of metrics for which lower is better, besides those that end with "loss"
_LOWEST_IS_BEST = ("loss/", "rmse/", "calibration/", "gap_error", "saturated", "chosen_falling")


def setting_problems(args: TrainingArguments) -> Iterator[Problem]:
    """Yield the problems of settings of transformers and accelerate with no effect or a wrong one."""
    yield from refusals(TRAINING, vars(args), defaults_of(TrainingArguments))
    yield from _accelerator_problems(args.accelerator_config)
    yield from _fsdp_problems(args)
    yield from _companion_problems(args)


def require_readable_settings(args: TrainingArguments) -> None:
    """Raise RecipeError if a setting that is JSON, or the path of a JSON file, cannot be read.

    transformers parses a string that starts with `{` as JSON. Other strings are paths for the settings of
    `_FILES` (DeepSpeed reads its own file), and invalid for those of `_DICTS`.
    """
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if not isinstance(value, str):
            content = value
        elif value.startswith("{") or name in _FILES:
            content = _read_json(name, value)
        elif name in _DICTS:
            raise _unreadable(name, value, "it is neither a dict nor JSON", "pass a dict")
        else:
            continue
        if name == "accelerator_config" and isinstance(content, Mapping):
            known = by_name(ACCELERATOR)
            if problems := list(_unknown(content, known, "accelerator_config.")):
                raise RecipeError(
                    "; ".join(problem.text for problem in problems),
                    code="training.unknown-setting",
                    details={"settings": [problem.setting for problem in problems]},
                    where=name,
                    why="accelerate has no such field",
                    fix=f"its fields are {', '.join(known)}",
                )


def _read_json(name: str, value: str) -> Any:
    inline = value.startswith("{")
    try:
        content = json.loads(value if inline else Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fix = "correct the JSON" if inline else "pass a dict, JSON, or the path of a JSON file"
        raise _unreadable(name, value, error, fix) from error
    if not isinstance(content, dict):
        raise _unreadable(name, value, "it is not a JSON object", "write {...} to the file")
    return content


def _unreadable(name: str, value: str, reason: object, fix: str) -> RecipeError:
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    return RecipeError(
        f"{name}: {shown} cannot be read: {reason}",
        code="training.unreadable-setting",
        where=name,
        fix=fix,
    )


def require_one_checkpointing(args: TrainingArguments) -> None:
    """Raise RecipeError if the two names of gradient checkpointing have different values."""
    if problems := list(_checkpointing_conflicts(args)):
        raise RecipeError(
            "; ".join(problem.text for problem in problems),
            code="training.conflicting-settings",
            details={"settings": [problem.setting for problem in problems]},
            where=type(args).__name__,
            why="they are two names of one setting",
            fix="remove one of them",
        )


def _checkpointing_conflicts(args: TrainingArguments) -> Iterator[Problem]:
    for end in ("", "_kwargs"):
        names = [f"gradient_checkpointing{end}", f"activation_checkpointing{end}"]
        old, new = (getattr(args, name, None) for name in names)
        if old is not None and new is not None and old != new:
            yield Problem(
                f"{names[0]}={old} and {names[1]}={new} conflict",
                code="training.conflicting-settings",
                setting=names[1],
            )


def _accelerator_problems(config: Any) -> Iterator[Problem]:
    values = config.to_dict()
    prefix = "accelerator_config."
    yield from refusals(ACCELERATOR, values, defaults_of(AcceleratorConfig), prefix)
    kwargs = values.get("gradient_accumulation_kwargs") or {}
    prefix += "gradient_accumulation_kwargs."
    yield from _unknown(kwargs, by_name(ACCUMULATION), prefix)
    yield from refusals(ACCUMULATION, kwargs, defaults_of(GradientAccumulationPlugin), prefix)


def _fsdp_problems(args: TrainingArguments) -> Iterator[Problem]:
    config = args.fsdp_config
    if not config:
        return
    if not args.fsdp:
        yield Problem(
            "fsdp_config has no effect without fsdp: set fsdp=True, or remove it",
            code="training.no-effect",
            setting="fsdp_config",
        )
        return
    if isinstance(config, dict):
        yield from _unknown(config, by_name(FSDP), "fsdp_config.")
        yield from refusals(FSDP, config, {}, "fsdp_config.")


def _unknown(
    given: Mapping[str, Any], known: Mapping[str, Setting], prefix: str
) -> Iterator[Problem]:
    for name in given:
        if name not in known:
            near = did_you_mean(name, list(known))
            hint = f"did you mean {near}?" if near else "remove it"
            yield Problem(
                f"{prefix}{name} does not exist: {hint}",
                code="training.unknown-setting",
                setting=prefix + name,
            )


def _companion_problems(args: TrainingArguments) -> Iterator[Problem]:
    """Yield the problems of settings that depend on another one."""
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        yield (
            Problem(
                f"warmup_steps={args.warmup_steps} has no effect with lr_scheduler_type constant: use "
                "constant_with_warmup",
                code="training.no-effect",
                setting="warmup_steps",
            )
        )
    yield from _checkpointing_conflicts(args)
    if args.fsdp and args.gradient_checkpointing and _fsdp_checkpointing(args):
        yield (
            Problem(
                "gradient_checkpointing and fsdp_config.activation_checkpointing are both on: remove one "
                "(FSDP's communicates less)",
                code="training.conflicting-settings",
                setting="gradient_checkpointing",
            )
        )
    if not args.dataloader_num_workers:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                yield Problem(
                    f"{name} requires dataloader_num_workers above 0",
                    code="training.no-effect",
                    setting=name,
                )
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        yield Problem(
            "save_strategy=best requires eval_strategy: no checkpoint would be written",
            code="training.no-effect",
            setting="save_strategy",
        )


def lowest_is_best(metric: str) -> bool:
    """Whether lower values of an evaluation metric are better."""
    return metric.endswith("loss") or any(part in metric for part in _LOWEST_IS_BEST)


def require_best_metric(
    args: Any, metrics: Mapping[str | None, Collection[str]], *, router_loss: bool = False
) -> None:
    """Raise RecipeError if `metric_for_best_model` is not a metric of the evaluation.

    Args:
        args: a config.
        metrics: names of the metrics of each eval set, without prefix; the key of an unnamed set is None.
        router_loss: whether the model's config enables the load-balancing loss, which is then a metric too.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    named = None not in metrics
    routers = {"loss/router_aux"} if args.router_aux_loss_coef or router_loss else set()
    known = []
    for one, own in metrics.items():
        prefix = "eval_" if one is None else f"eval_{one}_"
        rest = name.removeprefix(prefix)
        memory = rest.startswith(_MEMORY) and not args.skip_memory_metrics
        if rest != name and (rest in own or rest in routers or rest in _SPEED or memory):
            return
        known += [prefix + metric for metric in sorted(own)]
    near = get_close_matches(name, known, n=3, cutoff=0.5) or known[:6]
    raise RecipeError(
        f"metric_for_best_model: the evaluation has no metric {name}",
        code="training.unknown-metric",
        where="metric_for_best_model",
        why="with several eval sets, metric names include the set's name" if named else None,
        fix=f"use one of its metrics, such as {', '.join(near)}",
    )


def bfloat16_by_default(args: TrainingArguments) -> bool:
    """Whether bfloat16 is the default: on devices that support it.

    TRL always turns it on. On a CPU it saves nothing, and on older GPUs it is an error.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.fp16 or launched != "no":
        return launched == "bf16" and not args.fp16
    return not args.use_cpu and bool(is_torch_bf16_gpu_available())


def checkpointing_by_default(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing is on by default: unless FSDP does it.

    Args:
        args: after transformers has read the file of `fsdp_config`.
    """
    launched = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false")
    return not (_is_true(launched) or _fsdp_checkpointing(args))


def _fsdp_checkpointing(args: TrainingArguments) -> bool:
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    return _is_true(config.get("activation_checkpointing", False))


def _is_true(value: Any) -> bool:
    """Parse a flag as accelerate does for FSDP."""
    return str(value).lower() in ("y", "yes", "t", "true", "on", "1")
