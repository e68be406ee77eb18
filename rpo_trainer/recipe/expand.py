"""Expand a recipe to the stages that run, with all references resolved; write a recipe as YAML."""

from __future__ import annotations

from typing import Any

from rpo_trainer.recipe.rules.chain import expanded_names
from rpo_trainer.recipe.schema import (
    DataSpec,
    PreferenceStage,
    Recipe,
    SFTStage,
    Stage,
    StageBase,
)
from rpo_trainer.recipe.yaml_document import dump


def expand_stages(recipe: Recipe) -> list[Stage]:
    """Return the stages in the order in which they run.

    `repeat` is expanded (NAME-1 to NAME-n). `init` and `reference` become `model`, the name of an
    earlier stage, or a path as written: `previous` is the last stage before with a policy as output
    (`model` if there is none), `init` as a reference is the initial model of the stage, and the name of
    a repeated stage is its last round.
    """
    stages: list[Stage] = []
    last_round: dict[str, str] = {}
    for stage in recipe.stages:
        names = expanded_names({"name": stage.name, "repeat": stage.repeat})
        for number, name in enumerate(names):
            policies = [s.name for s in stages if not s.trains_reward_model]
            previous = policies[-1] if policies else "model"
            wanted = stage.init if number == 0 else "previous"
            changes: dict[str, Any] = {"name": name, "repeat": 1}
            changes["init"] = init = _concrete(wanted, previous, last_round)
            if isinstance(stage, PreferenceStage):
                reference = init if stage.reference == "init" else stage.reference
                changes["reference"] = _concrete(reference, previous, last_round)
            if isinstance(stage, SFTStage) and stage.data.replay is not None:
                source = last_round[stage.data.replay.stage]
                replay = stage.data.replay.model_copy(update={"stage": source})
                changes["data"] = stage.data.model_copy(update={"replay": replay})
            else:
                changes["data"] = _rewarded(stage.data, number, names[0], last_round)
            stages.append(stage.model_copy(update=changes))
        last_round |= dict.fromkeys([stage.name, names[-1]], names[-1])
        last_round |= {name: name for name in names}
    return stages


def _rewarded(data: DataSpec, number: int, first: str, last_round: dict[str, str]) -> DataSpec:
    """Return `data` of one round, with references to stages resolved and `resample` applied."""
    changes: dict[str, Any] = {"resample": None}
    if number > 0 and data.resample == "once":
        return data.model_copy(
            update={
                **changes,
                "train": [],
                "generate": None,
                "score": None,
                "responses_from": first,
            }
        )
    if data.responses_from is not None:
        changes["responses_from"] = last_round[data.responses_from]
    if data.score is not None and data.score.model is not None:
        model = last_round.get(data.score.model, data.score.model)
        changes["score"] = data.score.model_copy(update={"model": model})
    if data.generate is not None:
        policies = [last_round.get(name, name) for name in data.generate.policies]
        changes["generate"] = data.generate.model_copy(update={"policies": policies})
    return data.model_copy(update=changes)


def _concrete(target: str, previous: str, last_round: dict[str, str]) -> str:
    if target == "previous":
        return previous
    return last_round.get(target, target)


def dump_resolved(recipe: Recipe) -> str:
    """Return YAML of the recipe as it runs: defaults merged, stages expanded, default values written out.

    The text is a recipe with the same stages. Paths stay as written: relative to the directory of the
    original recipe.
    """
    fields = recipe.model_dump(exclude_none=True, exclude={"defaults", "stages"})
    fields["stages"] = [_plain(stage) for stage in expand_stages(recipe)]
    return dump(fields)


def _plain(stage: StageBase) -> dict[str, Any]:
    fields = stage.model_dump(exclude_none=True)
    if stage.data.responses_from is not None:
        del fields["data"]["train"]  # empty
    return {"name": fields.pop("name"), "kind": fields.pop("kind"), **fields}
