"""Estimates of what a recipe needs: memory by part, steps, tokens, disk space, launch command.

estimate      `plan_recipe`: examples, steps, tokens, memory and disk of each stage; a measured time
memory        memory of a step and of the reference pass, simulated on fake tensors
  nf4           4-bit weights in the simulation, without bitsandbytes
engines       memory per device under DDP, FSDP2 and ZeRO; the launch command
disk          bytes that a run writes, free space, and file system errors
show          a plan as text
"""

from rpo_trainer.plan.engines import ENGINES, DeviceMemory, Engine, per_device
from rpo_trainer.plan.estimate import Plan, StagePlan, plan_recipe
from rpo_trainer.plan.memory import StepMemory, step_memory
from rpo_trainer.plan.show import plan_view

__all__ = [
    "ENGINES",
    "DeviceMemory",
    "Engine",
    "Plan",
    "StagePlan",
    "StepMemory",
    "per_device",
    "plan_recipe",
    "plan_view",
    "step_memory",
]
