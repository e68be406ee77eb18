"""One stage: its trainer from its recipe, training, the output, and what is measured afterwards."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from rpo_trainer import adapters, distributed, four_bits
from rpo_trainer.chain.callbacks import EvaluateBefore, StepZeroLog
from rpo_trainer.chain.data import StageData
from rpo_trainer.chain.hub import check_strategy
from rpo_trainer.errors import ModelError, Problems, RecipeError, did_you_mean
from rpo_trainer.recipe import (
    DPOStage,
    ModelSpec,
    PeftSpec,
    PreferenceStage,
    RewardStage,
    RPOStage,
    Stage,
    fill_from_environment,
)
from rpo_trainer.recipe.checks import NOT_READ
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
from rpo_trainer.trainers.base import PackedTrainer
from rpo_trainer.trainers.checkpoint import MANIFEST, checkpoints, last_complete, write_manifest
from rpo_trainer.trainers.engine import asks_for_shards
from rpo_trainer.trainers.warnings import EarlyWarnings
from rpo_trainer.usage import peak_memory

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

_GAPS_SHOWN = 512  # examples of the scatter in the report

# Stage fields that bear the same name in our configs.
_SAME = (
    "max_length", "truncation", "global_batch_size", "micro_batch_tokens", "learning_rate",
    "lr_scheduler_type",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim",
    "logging_steps", "save_total_limit", "report_to", "nonfinite",
    "beta", "loss_type", "sft_loss_weight", "sft_reduction", "average_logps", "step0_check",
    "disable_dropout", "label_smoothing", "reward_scale",
    "objective", "attributes", "reward_weights", "rating_range", "margin_scale",
)  # fmt: skip


def arithmetic(model: ModelSpec) -> str:
    """The dtype of a recipe's arithmetic; `auto` is bfloat16 on a GPU that has it, else float32."""
    if model.dtype != "auto":
        return model.dtype
    has = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if has else "float32"


def training_config(
    stage: Stage, model: ModelSpec, *, seed: int, folder: Path, run_dir: Path
) -> SFTConfig | DPOConfig | RPOConfig | RewardConfig:
    """The trainer's config of a stage.

    Raises:
        RecipeError: a name or value that transformers does not know or take, in `training_args` or
            elsewhere; a tracker that is not installed.
    """
    settings: dict[str, Any] = {
        name: getattr(stage, name) for name in _SAME if hasattr(stage, name)
    }
    if settings.get("reward_scale") == "auto":
        del settings["reward_scale"]  # before the data is read; see `fitted_stage`
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
        "use_cpu": not torch.cuda.is_available()
        and not torch.backends.mps.is_available()
        and not asks_for_shards(stage.training_args),
        "disable_tqdm": True,
        "log_level": "warning",
    }
    if (stage.data.eval or stage.data.eval_share) and stage.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": stage.eval_steps}
    if isinstance(stage, PreferenceStage):
        settings["reference_cache_dir"] = str(run_dir / "reference-cache")
    where = f"stages.{stage.name}.training_args"
    given = fill_from_environment(stage.training_args, where=where)
    check_strategy(given, where)
    # The chain pushes outputs itself, with their cards: see `push_output`.
    settings |= {**given, "push_to_hub": False}
    config = _config_class(stage)
    known = set(inspect.signature(config).parameters)
    if stage.gradient_checkpointing:
        # transformers has renamed it; the old name warns where the new one is known.
        new, old = "activation_checkpointing", "gradient_checkpointing"
        settings[new if new in known else old] = True
    problems = [
        RecipeError(
            f"transformers has no training argument {name}",
            where=f"{where}.{name}",
            why=NOT_READ,
            fix=_or_see(did_you_mean(name, sorted(known)), "transformers.TrainingArguments"),
        )
        for name in sorted(set(settings) - known)
    ]
    problems += _unknown_names(stage)
    if problems:
        raise Problems(problems)
    try:
        made = config(**settings)
    except RecipeError as error:
        _, _, field = (error.where or "").partition(".")
        raise error.at(f"stages.{stage.name}" + (f".{field}" if field else "")) from None
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(
            str(error),
            where=f"stages.{stage.name}",
            why="transformers does not take these arguments together, or not on this machine",
            fix="see transformers.TrainingArguments for what it takes",
        ) from error
    try:
        trackers: Any = get_reporting_integration_callbacks
        for tracker in trackers(made.report_to):
            tracker()  # says here, not when training starts, that it is not installed
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(
            f"a tracker cannot start: {error}",
            where=f"stages.{stage.name}.report_to",
            why="nothing would be sent to it, and nobody would know before the end",
            fix="install its package, or take it out; metrics.jsonl has everything all the same",
        ) from error
    return made


def _unknown_names(stage: Stage) -> Iterator[RecipeError]:
    for field, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        known = [str(name.value) for name in names]
        if (value := getattr(stage, field)) not in known:
            yield RecipeError(
                f"transformers has no {field} {value}",
                where=f"stages.{stage.name}.{field}",
                why="none is taken in place of another",
                fix=_or_see(did_you_mean(value, known), "transformers.TrainingArguments"),
            )


def _or_see(near: str | None, place: str) -> str:
    return f"did you mean {near}?" if near else f"see {place} for the names"


def _config_class(stage: Stage) -> type[SFTConfig | DPOConfig | RPOConfig | RewardConfig]:
    if isinstance(stage, DPOStage):
        return DPOConfig
    if isinstance(stage, RewardStage):
        return RewardConfig
    return RPOConfig if isinstance(stage, RPOStage) else SFTConfig


def lora_config(stage: Stage) -> LoraConfig | None:
    """The adapter that a stage would begin; None: it trains all weights.

    Raises:
        RecipeError: a field of `peft` that LoraConfig does not know or take, or an adapter that cannot be
            trained here.
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
                where=f"{where}.{name}",
                why=NOT_READ,
                fix=_or_see(near, "peft.LoraConfig"),
            )
    try:
        config = LoraConfig(**fields)
        adapters.require_fit(config)
        adapters.require_plain_start(config)
        if stage.peft.quantization is not None:
            four_bits.nf4(torch.float32)
    except ModelError as error:
        raise RecipeError(error.what, where=where, why=error.why, fix=error.fix) from error
    except RecipeError as error:
        raise error.at(f"{where}.{error.where}") from None
    except (TypeError, ValueError, ImportError) as error:
        why = "PEFT makes no adapter of these settings"
        raise RecipeError(str(error), where=where, why=why, fix="see peft.LoraConfig") from error
    if stage.peft.quantization is not None and adapters.changes_base(config):
        raise RecipeError(
            f"init_lora_weights: {config.init_lora_weights} changes the weights below the adapter, "
            "which are in 4 bits",
            where=where,
            why="what it takes from them would be rounded away",
            fix="leave out init_lora_weights, or quantization",
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
        f"peft_type {kind}: a recipe trains LoRA adapters",
        where=where,
        why="the virtual tokens of a prompt-learning method stand before a row, and a row here holds many "
        "examples" if prompt else "the stages of a chain hand over LoRA adapters and no others",
        fix="leave peft_type out" + ("" if prompt else "; a trainer takes other methods (peft_config)"),
    )  # fmt: skip


def make_trainer(
    stage: Stage,
    config: SFTConfig | DPOConfig | RPOConfig | RewardConfig,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    data: StageData,
    callbacks: list[TrainerCallback],
) -> PackedTrainer:
    """The trainer of a stage, told nothing that the stage does not say."""
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": data.train,
        "eval_dataset": data.evaluation,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    trainer: PackedTrainer
    if isinstance(stage, DPOStage):
        trainer = DPOTrainer(ref_model=reference, **common)
    elif isinstance(stage, RPOStage):
        trainer = RPOTrainer(ref_model=reference, **common)
    elif isinstance(stage, RewardStage):
        trainer = RewardTrainer(**common)
    else:
        trainer = SFTTrainer(**common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_stage(
    trainer: PackedTrainer,
    folder: Path,
    *,
    begin: Callable[[int, bool], None],
    note: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Trains, or goes on from the last complete checkpoint.

    Args:
        begin: called before training, with the step it starts from (-1: from nothing) and whether
            the held-out examples were already evaluated at that step.
        note: called with what the record of the stage is to say before the stage is at its end.

    Returns:
        What the record is to say at the end; None: training was stopped before it.
    """
    checkpoint = distributed.on_main(lambda: _resume_from(folder))
    if checkpoint is None:
        begin(-1, False)
    else:
        step = int(checkpoint.name.split("-")[1])
        logger.info("going on from step %d", step)
        begin(step, _evaluation_at(step, _history(checkpoint)) is not None)
    held_out = trainer.eval_dataset is not None
    if held_out and checkpoint is None:
        evaluated = EvaluateBefore(trainer, lambda found: note({"eval_before": _finite(found)}))
        trainer.add_callback(evaluated)
    trainer.add_callback(StepZeroLog(trainer, note))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyWarnings):
            callback.note = lambda found: note({"warnings": found})
    trainer.step_guard.note = lambda skipped: note({"skipped": skipped})
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        return None
    results: dict[str, Any] = {"steps": state.global_step}
    if held_out:
        # With eval_steps, the last step may have been evaluated within training.
        known = _evaluation_at(state.global_step, state.log_history)
        results["eval_after"] = _finite(trainer.evaluate() if known is None else known)
    return {**results, "peak_memory_bytes": distributed.greatest(peak_memory())}


def _resume_from(folder: Path) -> Path | None:
    found = last_complete(folder)
    for later in checkpoints(folder):
        if later == found:
            break
        shutil.rmtree(later)  # damaged: it must not outlive the good ones that are written now
    return found


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    history: list[dict[str, Any]] = state["log_history"]
    return history


def _evaluation_at(step: int, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The log line of the evaluation at a step, if there is one."""
    return next((e for e in history if e.get("step") == step and "eval_loss" in e), None)


_AGREEMENT = ("accuracy", "pearson/", "spearman/", "rmse/", "bias/", "calibration/")


def agreement_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward stage's record says of held-out rows: the metrics, and the tables of calibration."""
    after = {k.removeprefix("eval_"): v for k, v in record.get("eval_after", {}).items()}
    found: dict[str, Any] = {k: v for k, v in after.items() if k.startswith(_AGREEMENT)}
    return {**found, "calibration": record["calibration"]} if record.get("calibration") else found


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and math.isfinite(value)
    }


def write_output(trainer: PackedTrainer, folder: Path) -> None:
    """`final/` of a stage that trains all weights: model and tokenizer, complete or absent."""
    final, staged = folder / "final", folder / ".final"
    distributed.on_main(lambda: shutil.rmtree(staged, ignore_errors=True))
    trainer.save_model(str(staged))

    def commit() -> None:
        write_manifest(staged)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)

    distributed.on_main(commit)


def output_fingerprint(final: Path) -> str:
    """Short content key of a stage's output: the hashes of its weights."""
    files = json.loads((final / MANIFEST).read_text())["files"]
    weights = [v["xxh3_128"] for name, v in sorted(files.items()) if name.endswith(".safetensors")]
    return "+".join(digest[:16] for digest in weights)


def write_gaps(trainer: PackedTrainer, path: Path) -> None:
    """Implicit and target gap of some training examples after the stage, one JSON line each."""
    examples = trainer.train_dataset
    rows = [examples[i] for i in range(min(len(examples), _GAPS_SHOWN))]
    size = trainer.args.per_device_train_batch_size
    lines: list[str] = []
    trainer.model.eval()
    for start in range(0, len(rows), size):
        batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
        with torch.no_grad(), trainer.accelerator.autocast():
            _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        for number, i in enumerate(batch["example_order"]):
            gaps = {name: float(values[number]) for name, values in outputs["gaps"].items()}
            lines.append(json.dumps({"id": batch["ids"][i], **gaps}) + "\n")
    trainer._eval_metrics.drain()
    if distributed.is_main():  # all have computed them: sharded weights need every process
        path.write_text("".join(lines))
