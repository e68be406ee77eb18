"""Rules between the stages of a recipe: names, references, evaluations and adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rpo_trainer.errors import suggestion
from rpo_trainer.recipe.rules.forms import At, Errors, Raw, wrong

PREFERENCE_KINDS = ("dpo", "rpo")
_POLICIES = ("sft", *PREFERENCE_KINDS)
_KINDS = (*_POLICIES, "reward")
_ANY_PLACE = ("previous", "model")  # always valid for `init` and `reference`
_RESERVED = (
    *_ANY_PLACE, "init",
    "recipe.yaml", "chain.json", "metrics.jsonl", "report.html", "reference-cache", "evaluation",
)  # fmt: skip
_HALVES = {"bf16": "bfloat16", "fp16": "float16"}


# --- names ---


def looks_like_path(text: str) -> bool:
    """Whether the text is a path; names of stages have no slash."""
    return "/" in text or "\\" in text or text.startswith("~")


def expanded_names(stage: Raw) -> list[str]:
    """Return the names of a raw stage after `repeat` is expanded."""
    name, repeat = stage["name"], stage.get("repeat", 1)
    if not isinstance(repeat, int) or not 1 < repeat <= 100:
        return [name]
    return [f"{name}-{number}" for number in range(1, repeat + 1)]


def stage_names(stages: Sequence[Raw]) -> list[str]:
    """Return all names of raw stages, rounds included."""
    return [name for stage in stages for name in [stage["name"], *expanded_names(stage)]]


def _named(stages: Sequence[Any]) -> list[Raw]:
    """Return the raw stages with a name; the others have an error already."""
    return [s for s in stages if isinstance(s, dict) and isinstance(s.get("name"), str)]


def _stages(raw: Raw) -> list[tuple[int, Raw, list[Raw]]]:
    """Return the raw stages of a recipe, each with its index and the named stages before it."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return []
    return [(i, s, _named(stages[:i])) for i, s in enumerate(stages) if isinstance(s, dict)]


def names_are_unique(raw: Raw) -> Errors:
    """Names of stages are unique and not reserved."""
    taken: set[str] = set()
    for i, stage, _ in _stages(raw):
        for name in dict.fromkeys(stage_names(_named([stage]))):
            if name in taken:
                yield wrong(
                    ("stages", i, "name"),
                    f"two stages have the name `{name}`",
                    code="recipe.duplicate-stage",
                    why="the name is the directory of the stage",
                    fix="rename one of them; note that `repeat` creates NAME-1, NAME-2, ...",
                )
                break
            taken.add(name)
        if stage.get("name") in _RESERVED:
            yield wrong(
                ("stages", i, "name"),
                f"`{stage['name']}` is a reserved name",
                code="recipe.reserved-name",
                why="it is a value of `init` and `reference`, or a file of the run directory",
                fix="choose another name",
            )


# --- dtype ---


def arithmetic_of_the_model(raw: Raw) -> Errors:
    """`bf16` or `fp16` of a stage agrees with the dtype of the model."""
    model = raw.get("model")
    dtype = model.get("dtype", "bfloat16") if isinstance(model, dict) else None
    for i, stage, _ in _stages(raw):
        arguments = stage.get("training_args")
        if not isinstance(arguments, dict) or dtype not in ("float32", *_HALVES.values()):
            continue
        on = [name for name in _HALVES if arguments.get(name) is True]
        if len(on) == 1 and _HALVES[on[0]] != dtype:
            yield wrong(
                ("stages", i, "training_args", on[0]),
                f"`{on[0]}: true` contradicts `model.dtype: {dtype}`",
                code="recipe.conflicting-fields",
                why="both set the dtype of autocast",
                fix=f"remove `{on[0]}`; for {_HALVES[on[0]]}, write `dtype: {_HALVES[on[0]]}` under "
                "`model`",
            )


# --- references to stages ---


@dataclass(frozen=True)
class _Reference:
    """A field of a stage that names an earlier one.

    Attributes:
        path: the field; if it is a list, each of its elements.
        by: kinds of stage that have the field.
        to: kinds of stage that it may refer to, as a function of the stage.
        unfit: the errors of a reference to a stage of another kind.
        words: other valid values.
        or_path: whether paths are valid.
    """

    path: tuple[str, ...]
    by: tuple[str, ...]
    to: Callable[[Raw], Sequence[str]]
    unfit: Callable[[At, str, str, Sequence[str]], Errors]
    words: tuple[str, ...] = ()
    or_path: bool = True


def _not_a_policy(at: At, name: str, kind: str, kinds: Sequence[str]) -> Errors:
    yield wrong(
        at,
        f"`{at[-1]}` refers to `{name}`, a reward stage",
        code="recipe.wrong-stage-kind",
        why="the output of a reward stage is a reward model, not a policy",
        fix="use a stage of another kind; `previous` is the policy before the reward stage",
    )


def _not_sft(at: At, name: str, kind: str, kinds: Sequence[str]) -> Errors:
    yield wrong(
        at,
        f"`replay.stage` must be an sft stage; `{name}` is {kind}",
        code="recipe.wrong-stage-kind",
        why="rows of other kinds do not have one response to train on",
        fix="use an earlier sft stage",
    )


def _of_another_sort(at: At, name: str, kind: str, kinds: Sequence[str]) -> Errors:
    yield wrong(
        at,
        f"`{'.'.join(map(str, at[3:]))}` cannot be `{name}`, a stage of kind {kind}",
        code="recipe.wrong-stage-kind",
        why="its output cannot be used here",
        fix=f"use an earlier stage of kind {' or '.join(kinds)}",
    )


def _starts_as(stage: Raw) -> Sequence[str]:
    """Return the kinds a stage can start from; only reward stages start from reward models."""
    data = stage.get("data")
    samples = isinstance(data, dict) and data.get("generate") is not None
    return _KINDS if stage.get("kind") == "reward" and not samples else _POLICIES


_REFERENCES = (
    _Reference(("init",), _KINDS, _starts_as, _not_a_policy, _ANY_PLACE),
    _Reference(
        ("reference",), PREFERENCE_KINDS, lambda _: _POLICIES, _not_a_policy, (*_ANY_PLACE, "init")
    ),
    _Reference(
        ("data", "replay", "stage"), ("sft", "reward"), lambda _: ("sft",), _not_sft, or_path=False
    ),
    _Reference(("data", "score", "model"), _KINDS, lambda _: ("reward",), _of_another_sort),
    _Reference(
        ("data", "generate", "policies"), _KINDS, lambda _: _POLICIES, _of_another_sort,
        ("init", "model"),
    ),
    _Reference(
        ("data", "responses_from"), _KINDS, lambda _: PREFERENCE_KINDS, _of_another_sort,
        or_path=False,
    ),
)  # fmt: skip


def references_are_earlier(raw: Raw) -> Errors:
    """References lead to earlier stages of a suitable kind."""
    stages = _stages(raw)
    every = _named([stage for _, stage, _ in stages])
    for i, stage, earlier in stages:
        for reference in _REFERENCES:
            if stage.get("kind") not in reference.by:
                continue
            for key, target in _texts(stage, reference.path):
                if target in reference.words or (reference.or_path and looks_like_path(target)):
                    continue
                at = ("stages", i, *key)
                yield from _known_stage(at, target, earlier, every, reference.words)
                found = next((s for s in earlier if target in stage_names([s])), None)
                kind, kinds = found and found.get("kind"), reference.to(stage)
                if found is None or kind not in _KINDS:
                    continue
                if kind not in kinds:
                    yield from reference.unfit(at, target, str(kind), kinds)
                elif key[-1] == "responses_from" and not _makes_rows(found):
                    yield wrong(
                        at,
                        f"`responses_from` refers to `{target}`, which does not sample responses",
                        code="recipe.wrong-stage-kind",
                        why="rows of a file can be listed under `train` of this stage",
                        fix="use a stage with `data: {generate: ..., score: ...}`",
                    )


def _texts(part: Any, path: Sequence[str]) -> Iterator[tuple[At, str]]:
    """Yield the texts at a path in a raw part, each with its key."""
    for field in path:
        part = part.get(field) if isinstance(part, dict) else None
    found = [((), part)] if not isinstance(part, list) else [((i,), p) for i, p in enumerate(part)]
    yield from (((*path, *at), text) for at, text in found if isinstance(text, str) and text)


def _makes_rows(stage: Raw) -> bool:
    data = stage.get("data")
    return isinstance(data, dict) and any(
        data.get(f) is not None for f in ("generate", "responses_from")
    )


def _known_stage(
    at: At, target: str, earlier: Sequence[Raw], every: Sequence[Raw], words: Sequence[str]
) -> Errors:
    """Yield an error unless `target` is the name of an earlier stage."""
    before = stage_names(earlier)
    if target in before:
        return
    field = re.sub(r"^stages\.\d+\.(data\.)?", "", ".".join(map(str, at)))
    choices = ", ".join(f"`{name}`" for name in dict.fromkeys([*words, *before]))
    fix = f"use one of {choices}" if choices else f"remove `{field}`: there is no earlier stage"
    if words:
        fix += ", or a path with a slash (./name)"
    why = "a stage can only use the output of earlier stages"
    if target in stage_names(every):
        what = f"`{field}` refers to `{target}`, which is not an earlier stage"
        yield wrong(at, what, code="recipe.later-stage", fix=fix, why=why)
        return
    hint = suggestion(target, [*words, *before])
    what = f"`{field}` refers to `{target}`, which is not a stage{hint}"
    yield wrong(at, what, code="recipe.unknown-stage", fix=fix, why=why)


# --- references of evaluations ---


def evaluations_are_possible(raw: Raw) -> Errors:
    """References of `eval` lead to stages that are finished by then, of a suitable kind."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    every = _rounds(stages)
    # `eval` of the recipe runs after every policy without its own: it can use stages before all of these.
    first = next((s for s in every if s["kind"] != "reward" and s["eval"] is None), None)
    before = every[: every.index(first)] if first is not None else every
    yield from _evaluation(("eval",), raw, every, before, every)
    for i, stage in enumerate(stages):
        if isinstance(stage, dict):
            earlier, own = _rounds(stages[:i]), _rounds([stage])
            yield from _evaluation(("stages", i, "eval"), stage, [*earlier, *own], earlier, every)


def _rounds(stages: list[Any]) -> list[dict[str, Any]]:
    """Return the expanded stages with the fields used here: a baseline is one round."""
    return [
        {"name": name, "kind": s.get("kind"), "eval": s.get("eval")}
        for s in _named(stages)
        for name in expanded_names(s)
    ]


def _evaluation(
    at: At, owner: Raw, policies: Sequence[Raw], finished: Sequence[Raw], every: Sequence[Raw]
) -> Errors:
    """Check the references of an `eval`.

    Args:
        owner: the recipe or stage that has it.
        policies: stages that can be the baseline.
        finished: stages that are finished whenever the evaluation runs.
    """
    for _, baseline in _texts(owner, ("eval", "baseline")):
        if baseline != "model" and not looks_like_path(baseline):
            there = [s for s in policies if s.get("kind") in _POLICIES]
            yield from _known_stage((*at, "baseline"), baseline, there, every, ("model",))
    for _, model in _texts(owner, ("eval", "score", "model")):
        if looks_like_path(model):
            continue
        key = (*at, "score", "model")
        if model in [s["name"] for s in every] and model not in [s["name"] for s in finished]:
            yield wrong(
                key,
                f"`score.model` is stage `{model}`, which runs after a stage to be evaluated",
                code="recipe.later-stage",
                why="the reward model does not exist yet",
                fix="move the reward stage to the front, or set `eval` in later stages only",
            )
            continue
        rewards = [s for s in finished if s.get("kind") == "reward"]
        yield from _known_stage(key, model, rewards, every, ())


# --- adapters ---

_AT_THE_END = ("between_stages", "merge")  # can differ between stages that train one adapter


def adapters_continue(raw: Raw) -> Errors:
    """The adapter of a stage fits its initial weights."""
    for i, stage, earlier in _stages(raw):
        peft = stage.get("peft")
        if not isinstance(peft, dict):
            continue
        at = ("stages", i, "peft")
        source = _start(stage, earlier)
        before = source.get("peft") if source is not None else None
        if isinstance(before, dict) and source is not None:
            yield from _after_an_adapter(at, peft, before, str(source.get("name")))
        if not peft.get("quantization"):
            continue
        if _merges(peft) and isinstance(stage.get("repeat"), int) and stage["repeat"] > 1:
            yield _rounded_away((*at, "between_stages"), "the update of each round")
        model = raw.get("model")
        random = isinstance(model, dict) and model.get("from_config") is not None
        target = stage.get("init", "previous")
        if random and source is None and (target == "model" or (target == "previous" and i == 0)):
            yield wrong(
                (*at, "quantization"),
                "`quantization` requires a pretrained model",
                code="recipe.quantized-random-weights",
                why="`from_config` has random weights",
                fix="remove `quantization`, or use a model with `name_or_path`",
            )


def _after_an_adapter(at: At, peft: Raw, before: Raw, name: str) -> Errors:
    if _merges(before):
        if before.get("quantization") and peft.get("quantization"):
            yield _rounded_away((*at, "quantization"), f"the update of stage {name}")
        return
    for field in dict.fromkeys([*before, *peft]):
        old, new = before.get(field), peft.get(field)
        if field in _AT_THE_END or old == new:
            continue
        yield wrong(
            (*at, field) if field in peft else at,
            f"`{field}` is `{_text(new)}` here, but `{field}: {_text(old)}` in stage {name}, whose adapter "
            "this stage continues to train",
            code="recipe.changed-adapter",
            why=f"stage {name} has `between_stages: keep`",
            fix=f"use the same `peft` in both stages, or write `between_stages: merge` in {name}",
        )


def _rounded_away(at: At, what: str) -> Any:
    return wrong(
        at,
        f"merged weights are quantized to 4 bits again: {what} would be mostly lost to rounding",
        code="recipe.requantized-weights",
        why="merged weights are close to the 4-bit levels that they were quantized to before",
        fix="write `between_stages: keep` in the stage before and here, so that the adapter is not merged",
    )


def _merges(peft: Raw) -> bool:
    return bool(peft.get("between_stages", "merge") == "merge")


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def _start(stage: Raw, earlier: Sequence[Raw]) -> Raw | None:
    """Return the stage that a stage starts from; None for a model, or an error reported elsewhere."""
    target = stage.get("init", "previous")
    policies = [s for s in earlier if s.get("kind") != "reward"]
    if target == "previous":
        return policies[-1] if policies else None
    return next((s for s in policies if target in stage_names([s])), None)
