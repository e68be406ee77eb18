"""Everything that can be known before training: data, tokenizer and template, disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from rpo_trainer.chain.data import build_evaluation, build_rows, needs_policy, tokenize_stage
from rpo_trainer.data import Audit, load_rows
from rpo_trainer.errors import Problems, RPOTrainerError, RunError
from rpo_trainer.loading import load_tokenizer
from rpo_trainer.recipe import LoadedRecipe, Stage, expand_stages

_LOW_DISK = 2**30


def check_recipe(loaded: LoadedRecipe, run_dir: Path) -> list[str]:
    """Reads and tokenises the data of every stage, without a model.

    Returns:
        Lines to show: what each stage will train on.

    Raises:
        Problems: all errors that were found.
    """
    problems: list[RPOTrainerError] = []
    lines: list[str] = []
    try:
        tokenizer = load_tokenizer(loaded.recipe.model, loaded.base_dir)
    except RPOTrainerError as error:
        raise Problems([error]) from error
    stages = expand_stages(loaded.recipe)
    by_name = {stage.name: stage for stage in stages}

    def rows_of(name: str) -> list[dict[str, object]]:
        return build_rows(
            by_name[name], loaded.base_dir, seed=loaded.recipe.seed, audit=Audit(), earlier=rows_of
        )

    for stage in stages:
        seed = loaded.recipe.seed if stage.seed is None else stage.seed
        audit = Audit()
        try:
            lines.append(f"{stage.name} ({stage.kind})")
            if needs_policy(stage.data):
                rows = load_rows(
                    stage.data.train,
                    kind="prompt",
                    base_dir=loaded.base_dir,
                    audit=audit,
                    seed=seed,
                )
                lines.append(f"  {len(rows)} prompts; the responses come from {stage.init}")
                continue
            rows = build_rows(stage, loaded.base_dir, seed=seed, audit=audit, earlier=rows_of)
            examples = tokenize_stage(stage, rows, tokenizer, audit)
            lines.append(f"  {len(examples)} examples, {_steps(stage, len(examples))} steps")
            held_out = build_evaluation(stage, loaded.base_dir, tokenizer, seed=seed)
            if held_out is not None:
                audit.check_overlap(rows, held_out[1])
                lines.append(f"  {len(held_out[0])} held-out examples")
            lines += [f"  {line}" for line in audit.summary_lines()]
        except Problems as found:
            problems += found.problems
        except RPOTrainerError as error:
            problems.append(error)
    free = shutil.disk_usage(_existing(run_dir)).free
    if free < _LOW_DISK:
        problems.append(
            RunError(f"only {free / 2**20:.0f} MiB of disk are free", where=str(run_dir))
        )
    if problems:
        raise Problems(_distinct(problems))
    return lines


def _steps(stage: Stage, examples: int) -> int:
    if stage.max_steps is not None:
        return stage.max_steps
    per_epoch = -(-examples // stage.global_batch_size)
    return int(-(-per_epoch * (stage.num_train_epochs or 1.0) // 1))


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _distinct(problems: list[RPOTrainerError]) -> list[RPOTrainerError]:
    """The rounds of a repeated stage find the same faults."""
    return list({str(problem): problem for problem in problems}.values())
