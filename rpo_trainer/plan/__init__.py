"""What a recipe will need before it runs: memory by part, steps, tokens, disk, the launch line.

estimate      `plan_recipe`: examples, steps, tokens, memory and disk of each stage; a measured time
memory        memory of a step and of the reference pass, by running them on tensors without content
  nf4           4-bit weights there, without bitsandbytes
engines       what each device holds under DDP, FSDP2 and ZeRO; the launch line
disk          bytes that a run writes, whether there is room, and errors of the file system
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
