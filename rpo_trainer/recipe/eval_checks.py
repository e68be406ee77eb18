"""Errors of a recipe about `eval`, more than one field at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import InitErrorDetails

from rpo_trainer.recipe.chain_checks import expanded_names, looks_like_path, unknown_stage
from rpo_trainer.recipe.checks import PREFERENCE_KINDS, named_stages, weight_checks, wrong

_MEASURES = ("data", "preferences", "nll", "lm_eval")
_POLICIES = ("sft", *PREFERENCE_KINDS)


def eval_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Something is measured; rewards need responses, and responses prompts and rewards."""
    for field in ("data", "preferences", "nll"):
        yield from weight_checks(raw.get(field), field)
    generate, score = raw.get("generate"), raw.get("score")
    if not any(raw.get(name) for name in _MEASURES):
        yield wrong(
            (),
            "`eval` measures nothing",
            why="a stage would be evaluated by nothing, and nobody would notice",
            fix=f"give at least one of {', '.join(f'`{name}`' for name in _MEASURES)}",
        )
    others = {"policies": ["init"], "endpoints": [], "with_ground_truth": False}
    said = generate if isinstance(generate, dict) else {}
    for field in [f for f, own in others.items() if said.get(f) not in (None, own)][:1]:
        what = f"an evaluation samples from the policy that the stage has made, not from `{field}`"
        why = "what others say tells nothing of this stage"
        yield wrong(("generate", field), what, fix=f"remove `{field}`", why=why)
    if score is not None and generate is None:
        yield wrong(
            ("score",),
            "`score` without `generate`: there are no responses to score",
            why="an evaluation scores what the policy says itself",
            fix="add `generate: {max_new_tokens: ...}` beside `score`",
        )
    if generate is not None and score is None:
        yield wrong(
            ("generate",),
            "`generate` without `score`: nobody would look at the responses",
            why="sampling takes time, and nothing would come of it",
            fix="add `score: {verifier: ...}` beside `generate`",
        )
    if generate is not None and not raw.get("data"):
        yield wrong(
            ("generate",),
            "`generate` without `data`: there are no prompts to respond to",
            why="held-out prompts cannot be guessed",
            fix="add `data: [{path: ...}]` beside `generate`",
        )
    if raw.get("baseline") is not None and not (raw.get("preferences") or generate is not None):
        yield wrong(
            ("baseline",),
            "`baseline`, and nothing is compared with it",
            why="win rates need sampled responses, margins need held-out pairs",
            fix="add `generate` and `score`, or `preferences`; or remove `baseline`",
        )


def eval_reference_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """What `eval` says of stages: they are there when it is done, and of a kind that serves."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    every = _rounds(stages)
    # The recipe's own is done after each policy that has none: it can use what is before them all.
    first = next((s for s in every if s["kind"] != "reward" and s["eval"] is None), None)
    before = every[: every.index(first)] if first is not None else every
    yield from _references(("eval",), raw.get("eval"), every, before, every)
    for i, stage in enumerate(stages):
        if isinstance(stage, dict):
            earlier, own = _rounds(stages[:i]), _rounds([stage])
            at = ("stages", i, "eval")
            yield from _references(at, stage.get("eval"), [*earlier, *own], earlier, every)


def _rounds(stages: list[Any]) -> list[dict[str, Any]]:
    """Stages as they run, with what matters here: a baseline is one round, not a repeated stage."""
    named = [stage for _, stage in named_stages(stages)]
    return [
        {"name": name, "kind": s.get("kind"), "eval": s.get("eval")}
        for s in named
        for name in expanded_names(s)
    ]


def _references(
    at: tuple[str | int, ...],
    spec: object,
    policies: Sequence[Mapping[str, Any]],
    finished: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
) -> Iterator[InitErrorDetails]:
    if not isinstance(spec, dict):
        return
    baseline = spec.get("baseline")
    if isinstance(baseline, str) and baseline != "model" and not looks_like_path(baseline):
        there = [s for s in policies if s.get("kind") in _POLICIES]
        yield from unknown_stage((*at, "baseline"), baseline, there, every, ("model",))
    score = spec.get("score")
    model = score.get("model") if isinstance(score, dict) else None
    if not isinstance(model, str) or looks_like_path(model):
        return
    key = (*at, "score", "model")
    if any(s["name"] == model for s in every) and not any(s["name"] == model for s in finished):
        what = f"`score.model` is stage `{model}`, which comes after a stage that it is to score"
        why = "there would be no reward model yet"
        fix = "put the reward stage first, or give `eval` to later stages alone"
        yield wrong(key, what, why=why, fix=fix)
        return
    rewards = [s for s in finished if s.get("kind") == "reward"]
    yield from unknown_stage(key, model, rewards, every, ())
