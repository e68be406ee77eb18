"""What differs between the engines that accelerate wraps around a model: none, DDP, FSDP2, DeepSpeed ZeRO.

none, ddp      every rank holds all weights; transformers loads a checkpoint before it wraps the model
fsdp2, zero1–3 the model is placed, cast and sharded when it is wrapped; a checkpoint is loaded after that
"""

from __future__ import annotations

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

ENGINE_FILE = "engine.json"


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
                why="accelerate takes it only where each process has a GPU, under a launcher",
                fix="start with `accelerate launch`, `torchrun` or `deepspeed` on GPUs, or leave it out",
            )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP 1 is not taken",
            why="it flattens weights that the head needs whole",
            fix="set fsdp_version: 2",
        )
    arithmetic = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if args.mixed_precision != arithmetic:
        raise RecipeError(
            f"the launcher asks for mixed precision {args.mixed_precision}, the run for {arithmetic}",
            fix="set the dtype of the model in the recipe (bf16 or fp16 of the config), and "
            "mixed_precision: 'no' in the launcher's file",
        )


def asks_for_shards(arguments: Mapping[str, Any]) -> bool:
    """Whether training arguments, or the launcher, ask for FSDP or DeepSpeed."""
    launched = _set("ACCELERATE_USE_DEEPSPEED") or _set("ACCELERATE_USE_FSDP")
    return launched or bool(arguments.get("deepspeed") or arguments.get("fsdp"))


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def settle(args: Any, accelerator: Accelerator) -> None:
    """Settings of the engine that would change the mathematics, set right before it wraps the model."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # accelerate rounds outputs to bfloat16, and ours are log-probs; sums over ranks stay float32.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
            )
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.hf_ds_config.config
        # DeepSpeed clips by its own setting; left out, it would not clip at all.
        clipping = config.get("gradient_clipping")
        if clipping in (None, "auto"):
            config["gradient_clipping"] = args.max_grad_norm
        elif float(clipping) != float(args.max_grad_norm):
            raise RecipeError(
                f"gradient_clipping is {clipping} in the DeepSpeed config, and max_grad_norm "
                f"{args.max_grad_norm}",
                fix='set gradient_clipping to "auto"',
            )


# --- the step of DeepSpeed ---


class DeepSpeedGuard:
    """Calls the guards inside DeepSpeed's step, the gradient's norm known and no weight moved yet.

    accelerate steps DeepSpeed within backward, so transformers' callback before the step comes too late.
    """

    def __init__(self, optimizer: Any, guards: Callable[[float], None]) -> None:
        self.zero = optimizer.optimizer
        self.guards = guards
        self.called = False
        inner = getattr(self.zero, "optimizer", self.zero)
        self._hook = inner.register_step_pre_hook(self._before)

    def _before(self, *args: Any) -> None:
        if not self.called:  # once a step, which moves the weights by groups
            self.called = True
            self.guards(float(getattr(self.zero, "_global_grad_norm", None) or 0.0))

    def after_step(self, *, may_skip: bool) -> None:
        """The guards, where DeepSpeed has left the step out because of what the gradient was."""
        if not self.called and not may_skip:
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
