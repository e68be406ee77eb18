"""Differences between the engines of accelerate: none, DDP, FSDP2, DeepSpeed ZeRO.

none, ddp      every rank holds all weights; transformers loads a checkpoint before it wraps the model
fsdp2, zero1–3 wrapping moves, casts and shards the model; a checkpoint is loaded afterwards

A trainer has one `Engine`, which configures accelerate and calls the guards before weights are updated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.models.multimodal import is_composite, is_multimodal, text_decoder
from rpo_trainer.models.sharding import full_state_dict
from rpo_trainer.models.unwrap import is_classifier, transformers_model

ENGINE_FILE = "engine.json"


class Engine:
    """Configures the engine that wraps the model of a trainer, and calls the guards before each step.

    Args:
        model: the model before it is wrapped.
        args: the trainer's config.
        before_update: the guards; called before each optimizer step with the gradient norm if only the engine
            has it, else with None.

    Attributes:
        wraps_late: whether the model is moved to its device when it is wrapped, not before.
        uses_deepspeed: whether the engine is DeepSpeed.

    Raises:
        RecipeError: accelerate has not started the requested engine, or has conflicting settings.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        accelerator: Accelerator,
        before_update: Callable[[float | None], None],
    ) -> None:
        check_engine(args, accelerator)
        apply_engine_overrides(args, accelerator)
        wrap_present_layers(model, accelerator)
        set_find_unused_parameters(model, args, accelerator)
        self.accelerator = accelerator
        self.wraps_late = wraps_late(accelerator)
        self.uses_deepspeed = getattr(accelerator.state, "deepspeed_plugin", None) is not None
        self._before_update = before_update
        self._deepspeed_guard: DeepSpeedGuard | None = None

    def guard_optimizer(self, optimizer: Any) -> None:
        """Make DeepSpeed call the guards within its step; called once, after wrapping the model."""
        if self.uses_deepspeed:
            self._deepspeed_guard = DeepSpeedGuard(optimizer, self._before_update)

    def require_wrapped(self) -> None:
        """Raise RecipeError for an evaluation before FSDP or DeepSpeed have wrapped the model."""
        if self.wraps_late and not self.accelerator._models:
            raise RecipeError(
                "evaluate() was called before train()",
                code="training.evaluate-before-train",
                why="FSDP and DeepSpeed wrap model and optimizer together when training starts",
                fix="set eval_on_start=True, or evaluate after training",
            )

    def before_optimizer_step(self) -> None:
        """Run the guards on the gradients; called before the optimizer step of the transformers loop."""
        if self._deepspeed_guard is None:
            self._before_update(None)
        else:
            self._deepspeed_guard.after_step()

    def full_weights(self, model: nn.Module, *, keep: bool) -> dict[str, Any]:
        """Return the gathered weights in float32 (with an adapter, only its weights); called on all ranks.

        Args:
            keep: whether this rank gets them.
        """
        return full_state_dict(model, keep=keep, trained_only=hasattr(model, "peft_config"))

    def accumulating(
        self, model: nn.Module, *, last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a context for one of several backward passes of a step; only the last reduces gradients.

        Used for steps whose micro-batches the loop of transformers does not count.
        """
        self.accelerator.sync_gradients = last
        # DeepSpeed counts its backward passes itself.
        if (
            last
            or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        ):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)  # type: ignore[no-any-return]

    def write(self, folder: Path) -> None:
        """Write engine and number of ranks to a checkpoint."""
        write_engine(folder, self.accelerator)


def engine_name(accelerator: Accelerator) -> str:
    """Return `none`, `ddp`, `fsdp2` or `zero0` to `zero3`."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "none"


def wraps_late(accelerator: Accelerator) -> bool:
    """Whether the model is moved to its device when it is wrapped, not before."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def check_engine(args: Any, accelerator: Accelerator) -> None:
    """Raise RecipeError if the requested engine was not started, or has conflicting settings."""
    kind, started = accelerator.distributed_type, accelerator.num_processes
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise RecipeError(
            f"{world_size} processes were launched, but accelerate has connected {started}",
            code="training.processes-not-joined",
            why="each process would train separately on the same data",
            fix="FSDP and DeepSpeed require a GPU per process; without GPUs use DDP",
        )
    requested = {
        DistributedType.DEEPSPEED: bool(args.deepspeed) or _set("ACCELERATE_USE_DEEPSPEED"),
        DistributedType.FSDP: bool(args.fsdp) or _set("ACCELERATE_USE_FSDP"),
    }
    for engine, name in ((DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "FSDP")):
        if requested[engine] and kind != engine:
            raise RecipeError(
                f"{name} was requested but has not started",
                code="training.engine-not-started",
                details={"engine": name},
                why="accelerate only starts it with a launcher and a GPU per process",
                fix="start with `accelerate launch`, `torchrun` or `deepspeed` on GPUs, or remove it",
            )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP 1 is not supported",
            code="training.unsupported-engine",
            why="it flattens weights that the head needs unflattened",
            fix="set fsdp_version: 2",
        )
    if kind == DistributedType.DEEPSPEED and args.fp16:
        raise RecipeError(
            "float16 is not supported with DeepSpeed",
            code="training.unsupported-engine",
            why="DeepSpeed rounds the weights to float16 before it copies them to float32",
            fix="use bfloat16, or DDP or FSDP2",
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise RecipeError(
            "the launcher sets a parallelism_config",
            code="training.unsupported-engine",
            why="each process trains on its own examples; tensor, context and sequence parallelism split "
            "examples between processes",
            fix="use DDP, FSDP2 or DeepSpeed ZeRO, and remove parallelism_config from the launcher's config "
            "file",
        )
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched.isdigit() and int(launched) not in (1, args.accumulation_by_number):
        raise RecipeError(
            f"the launcher sets {launched} gradient accumulation steps, the config "
            f"{args.accumulation_by_number}",
            code="training.launcher-conflict",
            where="gradient_accumulation_steps",
            why="the launcher's value would have no effect",
            fix="set global_batch_size or gradient_accumulation_steps in the config, and remove it from the "
            "launcher's config file",
        )
    arithmetic = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if args.mixed_precision != arithmetic:
        raise RecipeError(
            f"the launcher sets mixed precision {args.mixed_precision}, the config {arithmetic}",
            code="training.launcher-conflict",
            where="mixed_precision",
            why="the launcher's value would override the config",
            fix="set the dtype of the model in the recipe (bf16 or fp16 in the config), and "
            "mixed_precision: 'no' in the launcher's config file",
        )


def requests_sharding(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments or the launcher turn on FSDP or DeepSpeed."""
    launched = _set("ACCELERATE_USE_DEEPSPEED") or _set("ACCELERATE_USE_FSDP")
    return launched or bool(arguments.get("deepspeed") or arguments.get("fsdp"))


def requests_deepspeed(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments or the launcher turn on DeepSpeed."""
    return _set("ACCELERATE_USE_DEEPSPEED") or bool(arguments.get("deepspeed"))


def waits_each_micro_batch(args: Any) -> bool:
    """Whether ranks wait for each other in each micro-batch, to gather weights or to reduce gradients.

    That is FSDP, ZeRO-2 and ZeRO-3; with other engines they wait once per optimizer step.
    """
    plugin = args.deepspeed_plugin
    return (
        bool(args.fsdp)
        or _set("ACCELERATE_USE_FSDP")
        or (plugin is not None and plugin.zero_stage > 1)
    )


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def load_in_float32(args: Any) -> None:
    """Keep weights in float32 that ZeRO-3 shards while loading; called by the config.

    DeepSpeed's bfloat16 mode rounds the weights before it copies them to float32, so that small updates of
    one stage would be lost when the next one starts. See `apply_engine_overrides`.
    """
    plugin = args.deepspeed_plugin
    if plugin is None or not args.bf16:
        return
    plugin.deepspeed_config.pop("bf16", None)
    if getattr(plugin, "dschf", None) is not None:  # created by the launcher: loading uses a copy
        plugin.set_deepspeed_weakref()


def apply_engine_overrides(args: Any, accelerator: Accelerator) -> None:
    """Correct settings of the engine that would change results, before it wraps the model."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate would round the outputs, which are log-probs, to bfloat16; reduce in float32.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.hf_ds_config.config
        if args.bf16:
            # Use autocast, as with other engines. ZeRO-3 gathers weights in bfloat16 for DeepSpeed's list of
            # safe modules: autocast would keep a copy of all of them. Otherwise gradients are reduced in
            # float32.
            config["bf16"] = {"enabled": False}
            zero3 = config["zero_optimization"]["stage"] == 3
            safe: dict[str, Any] = {} if zero3 else {"lower_precision_safe_modules": []}
            configured = config.get("torch_autocast", {})
            config["torch_autocast"] = {"dtype": "bfloat16", **safe, **configured, "enabled": True}
            accelerator.native_amp = True  # `accelerator.autocast` would do nothing with DeepSpeed
        # DeepSpeed only clips if its own setting is given.
        clipping = config.get("gradient_clipping")
        if clipping in (None, "auto"):
            config["gradient_clipping"] = args.max_grad_norm
        elif float(clipping) != float(args.max_grad_norm):
            raise RecipeError(
                f"gradient_clipping is {clipping} in the DeepSpeed config, but max_grad_norm is "
                f"{args.max_grad_norm}",
                code="training.conflicting-settings",
                where="gradient_clipping",
                why="DeepSpeed would ignore max_grad_norm",
                fix='set gradient_clipping to "auto"',
            )


def wrap_present_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Make FSDP by default wrap only those layer classes of the model class that the model contains.

    Classes of multimodal models also name layers of towers that a checkpoint may not have.
    """
    plugin = (
        accelerator.state.fsdp_plugin
        if accelerator.distributed_type == DistributedType.FSDP
        else None
    )
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in model.modules()}
        names: Any = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(there & set(names)) or None


def set_find_unused_parameters(model: nn.Module, args: Any, accelerator: Accelerator) -> None:
    """Make DDP search for unused weights only if there may be some, because the search is slow."""
    if accelerator.ddp_handler is not None and args.ddp_find_unused_parameters is None:
        accelerator.ddp_handler.find_unused_parameters = may_be_unused(model)


def may_be_unused(model: nn.Module) -> bool:
    """Whether a step may not use a trained weight: outside decoder and head, or in a list of experts."""
    inner = transformers_model(model)
    parts = (
        (inner.base_model, inner.score)
        if is_classifier(inner)
        else (text_decoder(inner), inner.get_output_embeddings())
    )
    used = {id(p) for part in parts if part is not None for p in part.parameters()}
    if any(p.requires_grad and id(p) not in used for p in model.parameters()):
        return True
    if is_multimodal(inner.config) and not is_composite(inner.config):
        return True  # image projections are inside the decoder
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(part) for one in lists for part in one.modules() if part is not one}
    return any(id(one) in inside for one in lists)


# --- the step of DeepSpeed ---


class DeepSpeedGuard:
    """Calls the guards within DeepSpeed's step, when the gradient norm is known, before weights are updated.

    accelerate calls DeepSpeed's step within backward, so the callback of transformers before the step is too
    late.
    """

    def __init__(self, optimizer: Any, guards: Callable[[float | None], None]) -> None:
        self.zero = optimizer.optimizer
        self.guards = guards
        self.called = False
        inner = getattr(self.zero, "optimizer", self.zero)
        self._hook = inner.register_step_pre_hook(self._before)

    def _before(self, *args: Any) -> None:
        if not self.called:  # once per step, which has a call for each group of weights
            self.called = True
            self.guards(float(getattr(self.zero, "_global_grad_norm", None) or 0.0))

    def after_step(self) -> None:
        """Call the guards if DeepSpeed has skipped the step because of its gradient."""
        if not self.called:
            self.guards(float("inf"))
        self.called = False

    def remove(self) -> None:
        """Remove the hook."""
        self._hook.remove()


# --- checkpoints ---


def write_engine(folder: Path, accelerator: Accelerator) -> None:
    """Write engine and number of ranks to a checkpoint."""
    content = {"engine": engine_name(accelerator), "world_size": accelerator.num_processes}
    (folder / ENGINE_FILE).write_text(json.dumps(content))


def check_same_engine(folder: Path, accelerator: Accelerator) -> None:
    """Raise RunError if this engine or this number of ranks cannot load a checkpoint."""
    path = folder / ENGINE_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    engine, ranks = engine_name(accelerator), accelerator.num_processes
    plain = {"none", "ddp"}
    same = before["engine"] == engine or {before["engine"], engine} <= plain
    if same and (before["world_size"] == ranks or not engine.startswith("zero")):
        return
    raise RunError(
        f"the checkpoint was written by {before['engine']} on {before['world_size']} rank(s), "
        f"but this run uses {engine} on {ranks}",
        code="run.other-engine",
        details={"before": before, "now": {"engine": engine, "world_size": ranks}},
        where=str(folder),
        why="DeepSpeed only resumes with the same number of ranks"
        if same
        else "each engine has its own format of optimizer files",
        fix="use the same engine and number of ranks, or remove the checkpoints to restart the stage",
    )


def shard_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a reference model like the policy."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model.to(accelerator.device))  # type: ignore[no-any-return]
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        import deepspeed

        config = json.loads(json.dumps(accelerator.state.deepspeed_plugin.hf_ds_config.config))
        for name in ("optimizer", "scheduler"):
            config.pop(name, None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        return engine.module  # type: ignore[no-any-return]
    return model.to(accelerator.device)
