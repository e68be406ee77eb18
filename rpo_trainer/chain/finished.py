"""Checks when a run resumes: finished outputs and all inputs must be unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpo_trainer.chain.evaluation import baseline_of
from rpo_trainer.chain.input_files import InputFiles, check_input_files
from rpo_trainer.chain.outputs import output_fingerprint
from rpo_trainer.chain.state import ChainState
from rpo_trainer.errors import RunError
from rpo_trainer.recipe import Recipe, Stage
from rpo_trainer.stages.inputs import evaluation_of, sources_of_rows
from rpo_trainer.stages.output_dtype import EXACT, exact_is_needed
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.record import StageRecord
from rpo_trainer.trainers.manifest import verify_manifest


def check_finished(
    preparer: StagePreparer,
    state: ChainState,
    inputs: InputFiles,
    *,
    run_dir: Path,
    verify: bool = False,
) -> None:
    """Raise RunError if an output, or an input of a stage that has begun, has changed.

    Allowed changes of inputs (`ChainState.adopt`) are recorded.

    Args:
        verify: read the content of all files; False: of those whose size or times have changed.
    """
    stages = preparer.stages
    check_input_files(stages, state, inputs, run_dir, verify=verify)
    done = {record.name for record in state.stages if record.state == "done"}
    for stage in stages:
        record = state.stage(stage.name)
        if record is not None and record.state == "done":
            exact = record.output is not None and record.output.exact is not None
            needed = exact and exact_is_needed(preparer, stage.name, done)
            final = run_dir / stage.name / "final"
            _check_output(final, stage.name, record, exact=needed, verify=verify)


def _check_output(
    final: Path, name: str, record: StageRecord, *, exact: bool, verify: bool
) -> None:
    base, kept_exact = final.with_name("base"), final.with_name(EXACT)
    fault = verify_manifest(final, content=verify)
    if (
        fault is None
        and base.is_dir()
        and (fault := verify_manifest(base, content=verify)) is not None
    ):
        fault = f"base: {fault}"
    recorded = record.output.fingerprint if record.output is not None else None
    if fault is None and output_fingerprint(final) != recorded:
        fault = "the weights are not those that the stage wrote"
    seed = record.output.exact if record.output is not None and exact else None
    if fault is None and seed is not None:
        if (fault := verify_manifest(kept_exact, content=verify)) is not None:
            fault = f"{EXACT}: {fault}"
        elif output_fingerprint(kept_exact) != seed:
            fault = f"{EXACT}: the weights are not those that the stage wrote"
    if fault is not None:
        raise RunError(
            f"the output of the finished stage {name} is damaged: {fault}",
            code="run.damaged-output",
            where=str(final),
            why="later stages start from it",
            fix="restore it from a backup, or start in a new directory (--run-dir)",
        )


def check_starts(
    wanted: Sequence[Stage],
    stages: Sequence[Stage],
    recipe: Recipe,
    state: ChainState,
    run_dir: Path,
) -> None:
    """Raise RunError unless every stage that a wanted stage depends on is finished or also wanted."""
    names = {stage.name for stage in wanted}
    for stage in wanted:
        sources = {f"stages.{stage.name}.{field}": s for field, s in stage.models_read.items()}
        rows = sources_of_rows(stage.data)
        sources |= {f"stages.{stage.name}.data.{field}": s for field, s in rows.items()}
        sources |= _measured_with(stage, stages, recipe)
        for field, source in sources.items():
            record = state.stage(source)
            if record is not None and record.state != "done" and source not in names:
                short = field.removeprefix(f"stages.{stage.name}.")
                raise RunError(
                    f"stage {stage.name} needs stage {source} ({short}), which is not finished",
                    code="run.stage-not-finished",
                    where=str(run_dir),
                    fix=f"run the chain first (rpo-trainer run), or set {field} to model or a path",
                )


def _measured_with(stage: Stage, stages: Sequence[Stage], recipe: Recipe) -> dict[str, str]:
    """Return the sources that the evaluation of a stage needs, by recipe key."""
    measured = evaluation_of(stage, recipe)
    if measured is None:
        return {}
    key, spec = measured
    earlier = [other.name for other in stages][: stages.index(stage)]
    sources = {}
    if (baseline := baseline_of(spec, stages)) in earlier:
        sources[f"{key}.baseline"] = str(baseline)
    if spec.score is not None and spec.score.model is not None:
        sources[f"{key}.score.model"] = spec.score.model
    return sources
