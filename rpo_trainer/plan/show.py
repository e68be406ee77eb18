"""Terminal view of a plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from rpo_trainer.plan.estimate import Plan
from rpo_trainer.report.formatting import duration, size
from rpo_trainer.stages.output_dtype import EXACT

# Parts of memory and their column heads, for 80 columns.
_HEADS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "gathered": "gathered",
    "activations": "activ",
    "reference": "ref pass",
    "host": "host",
}


def plan_view(plan: Plan, run_dir: Path) -> Any:
    """Return two tables, notes, and the launch command, for `rich`."""
    return Group(_work(plan), _memory(plan), *_lines(plan, run_dir))


def _work(plan: Plan) -> Table:
    timed = any(stage.seconds is not None for stage in plan.stages)
    table = Table(title="work and disk space", title_justify="left", box=box.SIMPLE, padding=0)
    heads = ["stage", "kind", "examples", "steps", "tokens", "disk", *(["time"] * timed)]
    for head in heads:
        table.add_column(head, justify="left" if head in ("stage", "kind") else "right")
    for stage in plan.stages:
        mark = "≤ " if stage.assumed else ""
        row = [
            stage.name, stage.kind, f"{stage.examples:,}", f"{stage.steps:,}",
            f"{mark}{stage.tokens:,}", size(sum(stage.disk.values())),
        ]  # fmt: skip
        table.add_row(*row, *([mark + duration(stage.seconds)] if timed else []))
    return table


def _memory(plan: Plan) -> Table:
    title = f"memory per device ({plan.devices} devices, {plan.engine})"
    if plan.devices == 1:
        title = f"memory of the device ({plan.engine})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    shown = [part for part in _HEADS if any(getattr(stage.memory, part) for stage in plan.stages)]
    table.add_column("stage")
    for head in [*(_HEADS[part] for part in shown), "peak"]:
        table.add_column(head, justify="right", no_wrap=True)
    for stage in plan.stages:
        values = [size(getattr(stage.memory, part)) for part in shown]
        table.add_row(stage.name, *values, size(stage.memory.peak))
    return table


def _lines(plan: Plan, run_dir: Path) -> Iterator[str]:
    yield f"parameters: {plan.parameters:,}; peak: {size(plan.peak)} per device; disk: {size(plan.disk)}"
    yield (
        "activ: activations of the largest micro-batch, including chunks of logits. Not counted: the "
        "process, its libraries, and freed memory that the allocator caches."
    )
    if any(stage.memory.reference for stage in plan.stages):
        yield "ref pass: peak of the reference pass, before gradients and optimizer state exist."
    for dtype in sorted({stage.frozen for stage in plan.stages if stage.frozen is not None}):
        names = ", ".join(stage.name for stage in plan.stages if stage.frozen == dtype)
        why = (
            ": DeepSpeed requires one dtype for all weights"
            if plan.engine.startswith("zero")
            else ""
        )
        yield f"frozen base weights: {dtype} ({names}){why}."
    if any(EXACT in stage.disk for stage in plan.stages):
        yield "exact: float32 weights that the next stage starts from; deleted after it."
    if plan.devices > 1:
        shares = ", ".join(
            f"{stage.name} {'≥ ' * stage.assumed}{stage.idle_share:.1%}" for stage in plan.stages
        )
        yield f"idle: devices wait for the slowest one for a share of the time: {shares}."
    budgets = [stage for stage in plan.stages if stage.micro_batch_tokens is not None]
    if budgets:
        tokens = ", ".join(f"{stage.name} {stage.micro_batch_tokens:,}" for stage in budgets)
        yield f"micro_batch_tokens: {tokens}."
    if copied := max(stage.copied for stage in plan.stages):
        yield f"async_save: a copy of each checkpoint in CPU memory, up to {size(copied)}."
    if any(stage.assumed for stage in plan.stages):
        marks = "≤, ≥" if plan.devices > 1 else "≤"
        yield f"{marks}: responses are not sampled yet and count as max_new_tokens."
    folder = run_dir.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if plan.disk > free:
        yield f"DISK: {size(plan.disk)} needed, {size(free)} free at {run_dir}"
    yield f"start the run with:\n  {plan.launch}"
