"""Checks before training: arguments, models, data, disk space and the run directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rpo_trainer.chain.check_data import DataChecks
from rpo_trainer.chain.check_models import ModelChecks
from rpo_trainer.chain.findings import WARNING, Findings
from rpo_trainer.chain.input_files import InputFiles, check_input_files
from rpo_trainer.chain.run_dir import check_run_dir, check_writable
from rpo_trainer.chain.state import ChainState, plain
from rpo_trainer.errors import DataError
from rpo_trainer.plan.disk import check_disk
from rpo_trainer.recipe import LoadedRecipe
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.settings import lora_config


def check_recipe(
    loaded: LoadedRecipe,
    run_dir: Path,
    *,
    only: Collection[str] | None = None,
    preparer: StagePreparer | None = None,
) -> list[str]:
    """Prepare the data of every stage, and check everything else that needs no weights.

    Args:
        only: names of the stages to check; None: all stages and the run directory.
        preparer: the recipe's preparer; None: create one.

    Returns:
        Lines that say what each stage will train on.

    Raises:
        Problems: all errors found.
    """
    preparer, findings = preparer or StagePreparer(loaded, run_dir), Findings()
    models = ModelChecks(preparer, findings)
    data = DataChecks(preparer, findings, models)
    stages = [stage for stage in preparer.stages if only is None or stage.name in only]
    for stage in stages:
        findings.lines.append(f"{stage.name} ({stage.kind})")
        with findings.collected():
            preparer.settings(stage, run_dir)
        with findings.collected():
            lora_config(stage)
        models.check_stage(stage)
        data.check_stage(stage)
    # After other errors, the size of the model or of its checkpoints is unknown.
    if all(isinstance(problem, DataError) for problem in findings.problems):
        with findings.collected():
            check_disk(preparer, run_dir, stages, data.responses)
    if only is None:
        with findings.collected():
            _check_resumable(preparer, run_dir)
    findings.raise_problems(loaded.origins)
    return findings.lines


def count_warnings(lines: Sequence[str]) -> int:
    """Return how many lines of `check_recipe` are warnings."""
    return sum(line.lstrip().startswith(WARNING) for line in lines)


def _check_resumable(preparer: StagePreparer, run_dir: Path) -> None:
    """Raise RunError if the run in this directory cannot be resumed with this recipe."""
    check_run_dir(run_dir)
    check_writable(run_dir)
    if not run_dir.is_dir():
        return
    state, base_dir = ChainState(run_dir), preparer.loaded.base_dir
    state.adopt(*plain(preparer.recipe, preparer.stages, base_dir))
    inputs = InputFiles(preparer.recipe, preparer.stages, base_dir)
    check_input_files(preparer.stages, state, inputs, run_dir)
