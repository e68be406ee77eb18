"""What a recipe will need before it runs: memory by part, steps, tokens, disk, the launch line."""

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
