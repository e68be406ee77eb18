"""Errors of a recipe about rewards, more than one field at a time: generate, score, filter, reward stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import InitErrorDetails

from rpo_trainer.attributes import PRESETS, resolve_weights
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe.chain_checks import looks_like_path, stage_names, unknown_stage
from rpo_trainer.recipe.checks import NOT_READ, PREFERENCE_KINDS, named_stages, wrong
from rpo_trainer.redact import redact

SCORERS = ("verifier", "model", "endpoint", "judge")
CHOSEN_FILTERS = ("min_chosen_reward", "min_chosen_quantile", "keep_top_fraction")


def _given(raw: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if raw.get(name) is not None]


def endpoint_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """The address of an endpoint: http or https, and a host."""
    url = raw.get("url")
    if not isinstance(url, str) or not url:
        return  # the field's own error
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is not a number
        good = False
    if not good or not url.isprintable() or " " in url:
        yield wrong(
            ("url",),
            f"{redact(url)!r} is not the address of an endpoint",
            why="it must begin with http:// or https:// and name a host",
            fix="give its base url, for example http://localhost:8000/v1",
        )


def score_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """One source of rewards, with the fields that belong to it."""
    given = _given(raw, SCORERS)
    if not given:
        yield wrong(
            ("verifier",),
            "`score` names no scorer",
            why="nothing says where the rewards come from",
            fix=f"give one of {', '.join(f'`{name}`' for name in SCORERS)}",
        )
    for name in given[1:]:
        what = f"`score` has both `{given[0]}` and `{name}`"
        why = "each of them gives the rewards"
        yield wrong((name,), what, why=why, fix="keep one of the two")
    if len(given) != 1:
        return
    owners = {
        "weights": ("model", "endpoint"),
        "batch_tokens": ("model",),
        "allow_code_execution": ("verifier",),
    }
    for name in _given(raw, tuple(owners)):
        if raw[name] is not False and given[0] not in owners[name]:
            what = f"`{name}` belongs to `{'` or `'.join(owners[name])}`, not to `{given[0]}`"
            yield wrong((name,), what, why=NOT_READ, fix=f"remove `{name}`")
    code, allowed = raw.get("verifier") == "asserts", raw.get("allow_code_execution")
    if code and allowed is not True:
        yield wrong(
            ("verifier",),
            "the verifier `asserts` runs code that a model has written",
            fix="add `allow_code_execution: true`, and best run it inside a container",
            why="that code can do harm; it runs with limits, which are no wall",
        )
    if allowed is True and given[0] == "verifier" and not code:
        yield wrong(
            ("allow_code_execution",),
            f"`allow_code_execution` with the verifier `{raw['verifier']}`",
            why="only `asserts` runs code",
            fix="remove `allow_code_execution`",
        )


def generate_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Somebody to sample from."""
    if raw.get("policies") == [] and not raw.get("endpoints"):
        yield wrong(
            ("policies",),
            "`policies` is empty, and there are no `endpoints`",
            why="there is nobody to sample from",
            fix="name one under `policies` or `endpoints`",
        )


def rows_of_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Rows are made here or taken from another stage; what is never made is never made again."""
    if raw.get("responses_from") is None:
        if "train" not in raw:
            yield InitErrorDetails(type="missing", loc=("train",), input=raw)
    else:
        for field in _given(raw, ("train", "generate", "score")):
            what = f"`{field}` beside `responses_from`"
            why = "`responses_from` takes another stage's prompts with their scored responses"
            yield wrong((field,), what, why=why, fix="keep one of the two")
    if raw.get("resample") is not None and not isinstance(raw.get("generate"), dict):
        what, why = "`resample` without `generate`", "the same rows are read in each round anyway"
        yield wrong(("resample",), what, why=why, fix="remove `resample`")


def reference_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """What `data` of a stage says of other stages: they are earlier, and of a kind that serves."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    named = named_stages(stages)
    for i, stage in enumerate(stages):
        data = stage.get("data") if isinstance(stage, dict) else None
        if isinstance(data, dict):
            earlier = [s for j, s in named if j < i]
            every = [s for _, s in named]
            for at, target, kinds, words in _data_references(data):
                if target not in words:
                    at = ("stages", i, "data", *at)
                    yield from _stage_of_kind(at, target, kinds, words, earlier, every)


_Reference = tuple[tuple[str | int, ...], str, tuple[str, ...], tuple[str, ...]]


def _data_references(data: Mapping[str, Any]) -> Iterator[_Reference]:
    """(key, stage, kinds that serve, words that are no stage) for each."""
    score, generate, responses_from = (
        data.get("score"),
        data.get("generate"),
        data.get("responses_from"),
    )
    model = score.get("model") if isinstance(score, dict) else None
    if isinstance(model, str) and model and not looks_like_path(model):
        yield ("score", "model"), model, ("reward",), ()
    policies = generate.get("policies") if isinstance(generate, dict) else None
    for i, policy in enumerate(policies if isinstance(policies, list) else ()):
        if isinstance(policy, str) and policy and not looks_like_path(policy):
            kinds = ("sft", *PREFERENCE_KINDS)
            yield ("generate", "policies", i), policy, kinds, ("init", "model")
    if isinstance(responses_from, str) and responses_from:
        yield ("responses_from",), responses_from, PREFERENCE_KINDS, ()


def _stage_of_kind(
    at: tuple[str | int, ...],
    target: str,
    kinds: Sequence[str],
    words: Sequence[str],
    earlier: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
) -> Iterator[InitErrorDetails]:
    yield from unknown_stage(at, target, earlier, every, words)
    found = next((s for s in earlier if target in stage_names([s])), None)
    if found is None:
        return
    key = ".".join(map(str, at[3:]))
    if found.get("kind") not in kinds:
        what = f"`{key}` cannot be `{target}`, a stage of kind {found.get('kind')}"
        why = "its output is of another sort than what is needed here"
        fix = f"name an earlier stage of kind {' or '.join(kinds)}"
        yield wrong(at, what, why=why, fix=fix)
    elif key == "responses_from" and not _makes_rows(found):
        what = f"`responses_from` refers to `{target}`, which samples no responses"
        why = "rows that were given can be named under `train` here too"
        yield wrong(at, what, why=why, fix="name a stage with `data: {generate: ..., score: ...}`")


def _makes_rows(stage: Mapping[str, Any]) -> bool:
    data = stage.get("data")
    return isinstance(data, dict) and any(
        data.get(f) is not None for f in ("generate", "responses_from")
    )


def filter_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """One threshold for the chosen reward."""
    given = _given(raw, CHOSEN_FILTERS)
    for name in given[1:]:
        what = f"`filter` has both `{given[0]}` and `{name}`"
        why = "each of them says which chosen responses are good enough"
        yield wrong((name,), what, fix="keep one of the two", why=why)


def reward_stage_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """A reward stage: fields of its objective alone, and nothing that only a policy has."""
    objective = raw.get("objective")
    if objective == "regression" and raw.get("attributes") is None:
        what = "`objective: regression` without `attributes`"
        why = "they name what is rated, a head of the model for each"
        fix = "add for example `attributes: [helpfulness]`"
        yield wrong(("attributes",), what, why=why, fix=fix)
    foreign = {"regression": ("margin_scale",), "bradley_terry": ("attributes", "rating_range")}
    for field in _given(raw, foreign.get(str(objective), ())):
        if raw[field] != 0:
            what = f"`{field}` has no meaning for `objective: {objective}`"
            yield wrong((field,), what, why=NOT_READ, fix=f"remove `{field}`")
    names = raw.get("attributes")
    if isinstance(names, list) and len(set(map(str, names))) < len(names):
        what, why = "an attribute is named twice", "each is one head of the model"
        yield wrong(("attributes",), what, why=why, fix="name each once")
    bounds = raw.get("rating_range")
    pair = bounds if isinstance(bounds, list) and len(bounds) == 2 else [0, 1]
    if all(map(_is_number, pair)) and not pair[0] < pair[1]:
        what = f"`rating_range` goes from {pair[0]} to {pair[1]}"
        why = "no rating can be between them"
        yield wrong(("rating_range",), what, why=why, fix="write the lowest rating first")
    yield from _weights_checks(raw.get("reward_weights"), names)
    if raw.get("eval") is not None:
        what, why = "`eval` in a reward stage", "it measures a policy, and a reward model is none"
        fix = "remove it; `data.eval` or `data.eval_fraction` test the rewards"
        yield wrong(("eval",), what, why=why, fix=fix)
    if raw.get("peft") is not None:
        what, why = "`peft` in a reward stage", "a reward stage trains all weights"
        yield wrong(("peft",), what, why=why, fix="remove `peft`")
    if isinstance(raw.get("repeat"), int) and raw["repeat"] > 1:
        what, why = "`repeat` of a reward stage", "every round would start from the same policy"
        yield wrong(("repeat",), what, why=why, fix="remove it, and raise `num_train_epochs`")
    data = raw.get("data")
    if isinstance(data, dict) and data.get("eval_fraction") is not None and data.get("eval"):
        what = "`data` has both `eval` and `eval_fraction`"
        why = "each of them says which rows are held out"
        yield wrong(("data", "eval_fraction"), what, why=why, fix="keep one of the two")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weights_checks(weights: object, names: object) -> Iterator[InitErrorDetails]:
    """What `resolve_weights` would say later, where the attributes are known."""
    known = [str(name) for name in names] if isinstance(names, list) else []
    if isinstance(weights, str):
        known = known or list(PRESETS.get(weights, ()))
    elif not (isinstance(weights, dict) and known and all(map(_is_number, weights.values()))):
        return
    try:
        resolve_weights(weights, known)
    except RecipeError as error:
        yield wrong(("reward_weights",), error.what, why=str(error.why), fix=str(error.fix))
