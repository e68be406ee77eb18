"""What differs between the engines that accelerate wraps around a model: none, DDP, FSDP2, DeepSpeed ZeRO.

none, ddp      every rank holds all weights; transformers loads a checkpoint before it wraps the model
fsdp2, zero1–3 the model is placed, cast and sharded when it is wrapped; a checkpoint is loaded after that

A trainer has one `Engine`, which sets accelerate up and calls the guards before a weight moves.
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
    """Sets up what wraps a trainer's model, and calls the guards at the right moment.

    Args:
        model: as it is before it is wrapped.
        args: the trainer's config.
        before_update: the guards; called before each optimizer step with the norm of the gradient, where
            the engine knows it and transformers does not, else with None.

    Attributes:
        wraps_late: whether the model is placed on its device when it is wrapped, not before.
        uses_deepspeed: whether it is DeepSpeed.

    Raises:
        RecipeError: accelerate has not started what was asked for, or would do something else.
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
        """Has the guards called from within DeepSpeed's step; once, when it has wrapped the model."""
        if self.uses_deepspeed:
            self._deepspeed_guard = DeepSpeedGuard(optimizer, self._before_update)

    def require_wrapped(self) -> None:
        """Raises RecipeError for an evaluation that FSDP or DeepSpeed have not wrapped the model for."""
        if self.wraps_late and not self.accelerator._models:
            raise RecipeError(
                "evaluate() came before train()",
                code="training.evaluate-before-train",
                why="FSDP and DeepSpeed wrap the model together with its optimizer",
                fix="set eval_on_start=True, or evaluate after training",
            )

    def before_optimizer_step(self) -> None:
        """Where transformers' loop has the gradients and calls its optimizer next."""
        if self._deepspeed_guard is None:
            self._before_update(None)
        else:
            self._deepspeed_guard.after_step()

    def full_weights(self, model: nn.Module, *, keep: bool) -> dict[str, Any]:
        """Sharded weights in one piece and in float32, of an adapter its own; on all ranks at once.

        Args:
            keep: whether this rank is to have them.
        """
        return full_state_dict(model, keep=keep, trained_only=hasattr(model, "peft_config"))

    def accumulating(
        self, model: nn.Module, *, last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Around one of several backward passes of a step: gradients are reduced with the last one alone.

        For steps whose micro-batches transformers' loop does not count.
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
        """Notes in a checkpoint which engine, of how many ranks, has written it."""
        write_engine(folder, self.accelerator)


def engine_name(accelerator: Accelerator) -> str:
    """`none`, `ddp`, `fsdp2` or `zero0` to `zero3`."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "none"


def wraps_late(accelerator: Accelerator) -> bool:
    """Whether the model is placed on its device when it is wrapped, not before."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def check_engine(args: Any, accelerator: Accelerator) -> None:
    """Raises RecipeError where accelerate has not started what was asked for, or would do something else."""
    kind, started = accelerator.distributed_type, accelerator.num_processes
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if started != wanted:
        raise RecipeError(
            f"{wanted} processes were launched, and accelerate has joined {started}",
            code="training.processes-not-joined",
            why="each would train alone, on the same data",
            fix="FSDP and DeepSpeed need a GPU for each process; without GPUs leave them out (DDP)",
        )
    asked = {
        DistributedType.DEEPSPEED: bool(args.deepspeed) or _set("ACCELERATE_USE_DEEPSPEED"),
        DistributedType.FSDP: bool(args.fsdp) or _set("ACCELERATE_USE_FSDP"),
    }
    for engine, name in ((DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "FSDP")):
        if asked[engine] and kind != engine:
            raise RecipeError(
                f"{name} was asked for and has not started",
                code="training.engine-not-started",
                details={"engine": name},
                why="accelerate takes it only where each process has a GPU, under a launcher",
                fix="start with `accelerate launch`, `torchrun` or `deepspeed` on GPUs, or leave it out",
            )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP 1 is not taken",
            code="training.unsupported-engine",
            why="it flattens weights that the head needs whole",
            fix="set fsdp_version: 2",
        )
    if kind == DistributedType.DEEPSPEED and args.fp16:
        raise RecipeError(
            "float16 under DeepSpeed is not taken",
            code="training.unsupported-engine",
            why="DeepSpeed rounds the weights to it before it copies them to float32",
            fix="take bfloat16, or DDP or FSDP2",
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise RecipeError(
            "the launcher asks for a parallelism_config",
            code="training.unsupported-engine",
            why="each process trains on examples of its own; tensor, context and sequence parallelism would "
            "give parts of one example to several",
            fix="use DDP, FSDP2 or DeepSpeed ZeRO, and remove parallelism_config from the launcher's file",
        )
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched.isdigit() and int(launched) not in (1, args.gradient_accumulation_steps):
        raise RecipeError(
            f"the launcher asks for {launched} gradient accumulation steps, the run for "
            f"{args.gradient_accumulation_steps}",
            code="training.launcher-conflict",
            where="gradient_accumulation_steps",
            why="the launcher's figure would have no effect",
            fix="set global_batch_size or gradient_accumulation_steps in the config, and 1 or none in the "
            "launcher's file",
        )
    arithmetic = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if args.mixed_precision != arithmetic:
        raise RecipeError(
            f"the launcher asks for mixed precision {args.mixed_precision}, the run for {arithmetic}",
            code="training.launcher-conflict",
            where="mixed_precision",
            why="the launcher's would win, and the losses be rounded otherwise than the run says",
            fix="set the dtype of the model in the recipe (bf16 or fp16 of the config), and "
            "mixed_precision: 'no' in the launcher's file",
        )


def asks_for_shards(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments, or the launcher, ask for FSDP or DeepSpeed."""
    launched = _set("ACCELERATE_USE_DEEPSPEED") or _set("ACCELERATE_USE_FSDP")
    return launched or bool(arguments.get("deepspeed") or arguments.get("fsdp"))


def asks_for_deepspeed(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments, or the launcher, ask for DeepSpeed."""
    return _set("ACCELERATE_USE_DEEPSPEED") or bool(arguments.get("deepspeed"))


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def load_in_float32(args: Any) -> None:
    """Lets models that ZeRO-3 hands out while they are loaded keep their float32; when arguments are made.

    DeepSpeed's own bfloat16 rounds the weights first and copies them to float32 then: what a stage has
    learnt in steps of 1e-7 would be lost when the next one starts. See `apply_engine_overrides`.
    """
    plugin = args.deepspeed_plugin
    if plugin is None or not args.bf16:
        return
    plugin.deepspeed_config.pop("bf16", None)
    if (
        getattr(plugin, "dschf", None) is not None
    ):  # made by the launcher: a copy is what loading sees
        plugin.set_deepspeed_weakref()


def apply_engine_overrides(args: Any, accelerator: Accelerator) -> None:
    """Corrects settings of the engine that would change the mathematics, before it wraps the model."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate rounds outputs to bfloat16, and ours are log-probs; sums over ranks stay float32.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.hf_ds_config.config
        if args.bf16:
            # Autocast, as everywhere else. What ZeRO-3 gathers comes in bfloat16, by DeepSpeed's list of safe
            # modules: autocast would keep a copy of it all. Elsewhere gradients are summed in float32.
            config["bf16"] = {"enabled": False}
            zero3 = config["zero_optimization"]["stage"] == 3
            safe: dict[str, Any] = {} if zero3 else {"lower_precision_safe_modules": []}
            given = config.get("torch_autocast", {})
            config["torch_autocast"] = {"dtype": "bfloat16", **safe, **given, "enabled": True}
            accelerator.native_amp = True  # `accelerator.autocast` would be none under DeepSpeed
        # DeepSpeed clips by its own setting; left out, it would not clip at all.
        clipping = config.get("gradient_clipping")
        if clipping in (None, "auto"):
            config["gradient_clipping"] = args.max_grad_norm
        elif float(clipping) != float(args.max_grad_norm):
            raise RecipeError(
                f"gradient_clipping is {clipping} in the DeepSpeed config, and max_grad_norm "
                f"{args.max_grad_norm}",
                code="training.conflicting-settings",
                where="gradient_clipping",
                why="DeepSpeed clips by its own figure, and nothing would read the other",
                fix='set gradient_clipping to "auto"',
            )


def wrap_present_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Has FSDP shard by those of the class's layers that the model has, where no others are asked for.

    Classes of multimodal models also name layers of towers that a checkpoint does not have.
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
    """Has DDP look for weights without a gradient only where there may be some: each time ranks must meet."""
    if accelerator.ddp_handler is not None and args.ddp_find_unused_parameters is None:
        accelerator.ddp_handler.find_unused_parameters = may_be_unused(model)


def may_be_unused(model: nn.Module) -> bool:
    """Whether a packed step may leave a trained weight out: beside decoder and head, or a list of experts."""
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
        return True  # projections of images stand inside the decoder
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(part) for one in lists for part in one.modules() if part is not one}
    return any(id(one) in inside for one in lists)


# --- the step of DeepSpeed ---


class DeepSpeedGuard:
    """Calls the guards inside DeepSpeed's step, the gradient's norm known and no weight moved yet.

    accelerate steps DeepSpeed within backward, so transformers' callback before the step comes too late.
    """

    def __init__(self, optimizer: Any, guards: Callable[[float | None], None]) -> None:
        self.zero = optimizer.optimizer
        self.guards = guards
        self.called = False
        inner = getattr(self.zero, "optimizer", self.zero)
        self._hook = inner.register_step_pre_hook(self._before)

    def _before(self, *args: Any) -> None:
        if not self.called:  # once a step, which moves the weights by groups
            self.called = True
            self.guards(float(getattr(self.zero, "_global_grad_norm", None) or 0.0))

    def after_step(self) -> None:
        """The guards, where DeepSpeed has left the step out because of what the gradient was."""
        if not self.called:
            self.guards(float("inf"))
        self.called = False

    def remove(self) -> None:
        """Takes the hook off."""
        self._hook.remove()


# --- checkpoints ---


def write_engine(folder: Path, accelerator: Accelerator) -> None:
    """Notes which engine, of how many ranks, has written a checkpoint."""
    content = {"engine": engine_name(accelerator), "world_size": accelerator.num_processes}
    (folder / ENGINE_FILE).write_text(json.dumps(content))


def check_same_engine(folder: Path, accelerator: Accelerator) -> None:
    """Raises RunError where a checkpoint cannot be read by this engine, or by so many ranks."""
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
        f"the checkpoint was written by {before['engine']} on {before['world_size']} ranks, "
        f"and this is {engine} on {ranks}",
        code="run.other-engine",
        details={"before": before, "now": {"engine": engine, "world_size": ranks}},
        where=str(folder),
        why="DeepSpeed resumes with as many ranks as it had"
        if same
        else "each engine keeps its optimizer in files of its own",
        fix="start as before, or remove the checkpoints to begin the stage again",
    )


def shard_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A reference beside the policy, sharded as the policy is."""
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
