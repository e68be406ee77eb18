"""What lies in a run directory when a run goes on: finished stages and their data are as they were left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo_trainer.chain.changes import data_changed
from rpo_trainer.chain.data import source_digests
from rpo_trainer.chain.evaluation import baseline_of
from rpo_trainer.chain.made import sources_of_rows
from rpo_trainer.chain.state import ChainState
from rpo_trainer.chain.training import output_fingerprint
from rpo_trainer.errors import RunError
from rpo_trainer.recipe import PreferenceStage, Recipe, RewardStage, Stage
from rpo_trainer.trainers.checkpoint import damage


def check_finished(
    stages: Sequence[Stage], state: ChainState, *, base_dir: Path, run_dir: Path
) -> None:
    """Raises RunError where the data of a stage that has begun, or an output, is not what it was.

    Data that may have changed (`ChainState.adopt`) is taken over, and the change is kept.
    """
    for stage in stages:
        record = state.stage(stage.name)
        if record is None or record["state"] == "pending":
            continue
        _check_data(stage, record, state, base_dir, run_dir)
        if record["state"] == "done":
            _check_output(run_dir / stage.name / "final", stage.name, record)


def _check_data(
    stage: Stage, record: dict[str, Any], state: ChainState, base_dir: Path, run_dir: Path
) -> None:
    found = source_digests(stage.data.train, base_dir)
    known = record.get("sources", {})
    changed = [name for name, digest in found.items() if known.get(name, digest) != digest]
    if not changed:
        return
    if not state.allows_other_data(stage.name):
        raise data_changed(
            f"the data has changed since stage {stage.name} began: {', '.join(changed)}",
            stage.name,
            run_dir,
            why="a run goes on only with the data it began with",
            undo="restore the files",
        )
    for name in changed:
        state.note(f"stages.{stage.name}.data: {name}", known[name], found[name])
    record["sources"] = {**known, **{name: found[name] for name in changed}}


def _check_output(final: Path, name: str, record: Mapping[str, Any]) -> None:
    base = final.with_name("base")
    fault = damage(final)
    if fault is None and base.is_dir() and (fault := damage(base)) is not None:
        fault = f"base: {fault}"
    if fault is None and output_fingerprint(final) != record["output"]["fingerprint"]:
        fault = "these are other weights than the stage has written"
    if fault is not None:
        raise RunError(
            f"the output of the finished stage {name} is damaged: {fault}",
            where=str(final),
            why="later stages start from it",
            fix="restore it from a copy, or start in a new directory (--run-dir)",
        )


def check_starts(
    wanted: Sequence[Stage],
    stages: Sequence[Stage],
    recipe: Recipe,
    state: ChainState,
    run_dir: Path,
) -> None:
    """Raises RunError unless every stage that a wanted one needs is finished, or will be."""
    there = {stage.name for stage in wanted}
    for stage in wanted:
        sources = {f"stages.{stage.name}.init": stage.init}
        if isinstance(stage, PreferenceStage):
            sources[f"stages.{stage.name}.reference"] = stage.reference
        rows = sources_of_rows(stage.data)
        sources |= {f"stages.{stage.name}.data.{field}": s for field, s in rows.items()}
        sources |= _measured_with(stage, stages, recipe)
        for field, source in sources.items():
            record = state.stage(source)
            if record is not None and record["state"] != "done" and source not in there:
                short = field.removeprefix(f"stages.{stage.name}.")
                raise RunError(
                    f"the {short} of stage {stage.name} is stage {source}, which is not finished",
                    where=str(run_dir),
                    why="a stage starts from what is there, and is measured with it",
                    fix=f"run the whole chain first (rpo-trainer run), or set {field} to model or a path",
                )


def _measured_with(stage: Stage, stages: Sequence[Stage], recipe: Recipe) -> dict[str, str]:
    """Sources that the evaluation of a stage needs, by the recipe's key."""
    spec = stage.eval or recipe.eval
    if spec is None or isinstance(stage, RewardStage):
        return {}
    key = "eval" if stage.eval is None else f"stages.{stage.name}.eval"
    earlier = [other.name for other in stages][: stages.index(stage)]
    found = {}
    if (baseline := baseline_of(spec, stages)) in earlier:
        found[f"{key}.baseline"] = str(baseline)
    if spec.score is not None and spec.score.model is not None:
        found[f"{key}.score.model"] = spec.score.model
    return found
