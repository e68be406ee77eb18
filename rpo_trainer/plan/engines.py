"""How each engine distributes the memory of a step over devices, and how it is launched.

`n` weights on `W` devices. Weights, their gradients and Adam's state are 4 + 4 + 8 bytes each on one device.

    ddp            everything on every device; the gradients once more in communication buckets
    fsdp2          1/W of everything; gathered weights of two layers and modules outside layers
    zero2          all weights; 1/W of gradients, optimizer state and the optimizer's copy of the weights;
                   plus a bucket of gradients
    zero3          1/W of everything, that copy included; plus a bucket, and as many gathered weights as
                   DeepSpeed keeps live
    zero3_offload  as zero3, with optimizer state, its copy of the weights and sharded weights on the host

Frozen weights take 2 bytes each in half precision, except under DeepSpeed, and have no gradients or state.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rpo_trainer.errors import RecipeError
from rpo_trainer.plan.memory import StepMemory

Engine = Literal["single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
ENGINES: tuple[str, ...] = get_args(Engine)
# Their ranks wait for each other in each micro-batch; those of the others once per step.
IN_EACH_MICRO_BATCH = ("fsdp2", "zero2", "zero3", "zero3_offload")

# DeepSpeed's stage3_max_live_parameters and reduce_bucket_size, by default.
_LIVE, _BUCKET = 10**9, 5 * 10**8


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device while a stage trains, by part; `host` is memory of the host.

    Attributes:
        gathered: weights that a sharding engine gathers temporarily; buckets of DDP.
        reference: peak of the reference pass, which runs before gradients and optimizer state exist.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    reference: int
    host: int = 0

    @property
    def training(self) -> int:
        """Peak of an optimizer step."""
        parts = (self.weights, self.gradients, self.optimizer, self.gathered, self.activations)
        return sum(parts)

    @property
    def peak(self) -> int:
        """Peak of the stage."""
        return max(self.training, self.reference)


def check_devices(engine: Engine, devices: int, nodes: int) -> None:
    """Raise RecipeError if the engine does not support the number of devices."""
    if engine == "single" and max(devices, nodes) > 1:
        raise RecipeError(
            f"--engine single uses one device, not {devices}",
            code="plan.single-process",
            where="--engine single",
            why="a process trains on one device, so the others would be idle",
            fix=f"choose a distributed engine: --engine {' | '.join(ENGINES[1:])}",
        )


def per_device(memory: StepMemory, engine: Engine, devices: int, *, half: bool) -> DeviceMemory:
    """Spread a simulated step over `devices`.

    Args:
        half: the arithmetic is bfloat16, so gathered weights take 2 bytes each.
    """

    def share(size: int) -> int:
        return -(-size // devices)

    fixed = memory.unsharded
    weights, gradients, optimizer = memory.parameters - fixed, memory.gradients, memory.optimizer
    # The next layer is gathered while one computes; modules outside the layers stay gathered.
    unsharded = (memory.root + 2 * memory.layer) // (2 if half else 1)
    parts = {"gathered": 0, "host": 0}
    if engine == "ddp":
        parts["gathered"] = gradients if devices > 1 else 0
    elif engine == "fsdp2":
        weights, gradients, optimizer = map(share, (weights, gradients, optimizer))
        parts["gathered"] = unsharded if devices > 1 else 0
    elif engine in ("zero2", "zero3", "zero3_offload"):
        trained = gradients
        gradients, optimizer = share(trained), share(optimizer + trained)
        parts["gathered"] = min(trained, 4 * _BUCKET)
        if engine != "zero2":
            live = min(weights, max(4 * _LIVE, memory.root + 2 * memory.layer))
            parts["gathered"] = (parts["gathered"] + live) // (2 if half else 1)
            weights = share(weights)
        if engine == "zero3_offload":
            parts["host"] = optimizer + weights
            optimizer = weights = 0
    weights += fixed
    return DeviceMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=memory.activations,
        reference=(weights + parts["gathered"] + memory.reference) if memory.reference else 0,
        **parts,
    )


def launch_line(words: Sequence[str], engine: Engine, devices: int, nodes: int) -> str:
    """Return the command that launches the chain with an engine.

    Args:
        words: the recipe and further arguments: overrides, --run-dir.
    """
    run = f"run {shlex.join(words)}"
    if engine == "single":
        return f"rpo-trainer {run}"
    config = "multi_node" if nodes > 1 and engine == "ddp" else engine
    several = f" --num_machines {nodes} --machine_rank RANK --main_process_ip HOST" * (nodes > 1)
    return (
        f"accelerate launch --config_file recipes/accelerate/{config}.yaml "
        f"--num_processes {devices}{several} -m rpo_trainer {run}"
    )
