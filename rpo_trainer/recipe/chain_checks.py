"""Errors of a recipe that concern its stages together: their names, and what refers to what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import InitErrorDetails

from rpo_trainer.errors import did_you_mean
from rpo_trainer.recipe.checks import PREFERENCE_KINDS, named_stages, wrong

_HALVES = {"bf16": "bfloat16", "fp16": "float16"}
ANY_PLACE = ("previous", "model")  # words that `init` and `reference` always understand
RUN_FILES = (
    "recipe.yaml", "chain.json", "metrics.jsonl", "report.html", "reference-cache", "evaluation",
)  # fmt: skip


def recipe_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Names of stages and the references between them."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    named = named_stages(stages)
    taken: set[str] = set()
    for i, stage in named:
        for name in dict.fromkeys([stage["name"], *expanded_names(stage)]):
            if name in taken:
                yield wrong(
                    ("stages", i, "name"),
                    f"two stages have the name `{name}`",
                    why="a stage is known by its name, and has a directory of that name",
                    fix="give each stage a name of its own; `repeat` makes name-1, name-2, ...",
                )
                break
            taken.add(name)
        if stage["name"] in (*ANY_PLACE, "init", *RUN_FILES):
            yield wrong(
                ("stages", i, "name"),
                f"`{stage['name']}` cannot be the name of a stage: it has another meaning",
                why="`init`, `reference` or a file of the run directory goes by it",
                fix="choose another name",
            )
    yield from _half_checks(raw, stages)
    for i, stage in enumerate(stages):
        if isinstance(stage, dict):
            earlier = [s for j, s in named if j < i]
            yield from _reference_checks(i, stage, earlier, [s for _, s in named])


def _half_checks(raw: Mapping[str, Any], stages: Sequence[Any]) -> Iterator[InitErrorDetails]:
    """`bf16` or `fp16` of a stage against the dtype of the model."""
    model = raw.get("model")
    dtype = model.get("dtype", "bfloat16") if isinstance(model, dict) else None
    for i, stage in enumerate(stages):
        arguments = stage.get("training_args") if isinstance(stage, dict) else None
        if not isinstance(arguments, dict) or dtype not in ("float32", "bfloat16", "float16"):
            continue
        on = [name for name in _HALVES if arguments.get(name) is True]
        if len(on) == 1 and _HALVES[on[0]] != dtype:
            yield wrong(
                ("stages", i, "training_args", on[0]),
                f"`{on[0]}` is on, and `model.dtype` is {dtype}",
                why="the arithmetic is in one of them",
                fix=f"remove `{on[0]}`, and write `dtype: {_HALVES[on[0]]}` under `model` if that "
                "is meant",
            )


def expanded_names(stage: Mapping[str, Any]) -> list[str]:
    """The names that a raw stage has after `repeat` is expanded."""
    name, repeat = stage["name"], stage.get("repeat", 1)
    if not isinstance(repeat, int) or not 1 < repeat <= 100:
        return [name]
    return [f"{name}-{number}" for number in range(1, repeat + 1)]


def looks_like_path(text: str) -> bool:
    """Tell a path from the name of a stage, which holds no slash."""
    return "/" in text or "\\" in text or text.startswith("~")


def stage_names(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name of raw stages, those of their rounds too."""
    return [name for stage in stages for name in [stage["name"], *expanded_names(stage)]]


def _reference_checks(
    index: int,
    stage: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
) -> Iterator[InitErrorDetails]:
    yield from _policy_checks(index, stage, earlier)
    words: dict[str, tuple[str, ...]] = {"init": ANY_PLACE}
    if stage.get("kind") in PREFERENCE_KINDS:
        words["reference"] = (*ANY_PLACE, "init")
    for field, known in words.items():
        target = stage.get(field)
        if not isinstance(target, str) or not target or target in known or looks_like_path(target):
            continue
        yield from unknown_stage(("stages", index, field), target, earlier, every, known)
    data = stage.get("data")
    replay = data.get("replay") if isinstance(data, dict) else None
    target = replay.get("stage") if isinstance(replay, dict) else None
    if not isinstance(target, str) or not target or stage.get("kind") in PREFERENCE_KINDS:
        return
    at = ("stages", index, "data", "replay", "stage")
    yield from unknown_stage(at, target, earlier, every, ())
    kinds = [s.get("kind") for s in earlier if target in stage_names([s])]
    if kinds and kinds[0] != "sft":
        what = f"`replay.stage` must be an sft stage; `{target}` is {kinds[0]}"
        why = "rows of other kinds have no single response to train on"
        yield wrong(at, what, why=why, fix="name an earlier sft stage")


def _policy_checks(
    index: int, stage: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]
) -> Iterator[InitErrorDetails]:
    """A policy cannot go on from a reward model, nor be compared with one or sampled from it."""
    rewards = stage_names([s for s in earlier if s.get("kind") == "reward"])
    data = stage.get("data")
    samples = isinstance(data, dict) and data.get("generate") is not None
    for field in ("init", "reference"):
        target = stage.get(field)
        if not isinstance(target, str) or target not in rewards:
            continue
        if stage.get("kind") == "reward" and not samples:
            continue
        yield wrong(
            ("stages", index, field),
            f"`{field}` refers to `{target}`, a reward stage",
            why="it leaves a model that gives scores, and no policy",
            fix="name a stage of another kind; `previous` is the policy before the reward stage",
        )


def unknown_stage(
    at: tuple[str | int, ...],
    target: str,
    earlier: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
    words: Sequence[str],
) -> Iterator[InitErrorDetails]:
    """An error unless `target` is the name of an earlier stage."""
    before = stage_names(earlier)
    if target in before:
        return
    field = re.sub(r"^stages\.\d+\.(data\.)?", "", ".".join(map(str, at)))
    choices = ", ".join(f"`{name}`" for name in dict.fromkeys([*words, *before]))
    fix = f"use one of {choices}" if choices else "there is no earlier stage: remove it"
    if words:
        fix += ", or a path with a slash (./name)"
    why = "a stage can only use what is there when it starts"
    if target in stage_names(every):
        what = f"`{field}` refers to `{target}`, which is not earlier in the chain"
        yield wrong(at, what, fix=fix, why=why)
        return
    near = did_you_mean(target, [*words, *before])
    hint = f"; did you mean `{near}`?" if near else ""
    yield wrong(at, f"`{field}` refers to `{target}`, which is not a stage{hint}", fix=fix, why=why)
