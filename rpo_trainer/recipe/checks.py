"""Errors of a recipe that concern more than one field.

The checks read raw mappings, before validation, so that they can be reported beside wrong types and
ranges; a value of a wrong type is left to its field's own error. Each yields a pydantic error at
the key to go to.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

CHECK = "recipe_check"  # the error type of everything found here
PREFERENCE_KINDS = ("dpo", "rpo")
PREFERENCE_DATA = ("filter", "generate", "score", "pairs", "refresh", "rows_of")
LENGTH_FIELDS = ("num_train_epochs", "max_steps")  # one setting, two spellings
PAIR_LOSSES = ("rpo_sq",)  # defined for two responses only
ANY_PLACE = ("previous", "model")  # words that `init` and `reference` always understand
RUN_FILES = ("recipe.yaml", "chain.json", "metrics.jsonl", "report.html")
# TrainingArguments fields that the recipe says in other words
OTHER_NAMES = {
    "per_device_train_batch_size": "`micro_batch_size`",
    "gradient_accumulation_steps": "`global_batch_size`; accumulation follows from it",
    "output_dir": "the recipe's `run_dir`",
    "warmup_ratio": "`warmup_steps`",
    "eval_strategy": "`eval_steps`",
    "save_strategy": "`save_steps`",
    "logging_strategy": "`logging_steps`",
}


def wrong_value(what: str, fix: str, why: str | None = None) -> PydanticCustomError:
    """An error that keeps what, why and fix apart."""
    return PydanticCustomError(CHECK, "{what}; {fix}", {"what": what, "fix": fix, "why": why})


def wrong(
    at: tuple[str | int, ...], what: str, *, fix: str, why: str | None = None
) -> InitErrorDetails:
    """The same for a wrap validator, at the key `at` below the model."""
    return InitErrorDetails(type=wrong_value(what, fix, why), loc=at, input=None)


def details_of(error: ValidationError) -> list[InitErrorDetails]:
    """The errors of an exception, in the form that a new one is made of."""
    details = []
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        kind: str | PydanticCustomError = item["type"]
        if kind == CHECK:
            kind = PydanticCustomError(CHECK, "{what}; {fix}", context)
        details.append(
            InitErrorDetails(type=kind, loc=item["loc"], input=item["input"], ctx=context)
        )
    return details


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """The nearest known word, if one is near."""
    near = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return near[0] if near else None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _given(raw: Mapping[str, Any], *fields: str) -> list[str]:
    return [field for field in fields if raw.get(field) is not None]


def _exactly_one(
    raw: Mapping[str, Any], first: str, second: str, owner: str
) -> Iterator[InitErrorDetails]:
    given = _given(raw, first, second)
    if len(given) == 2:
        what = f"{owner} has both `{first}` and `{second}`"
        yield wrong((second,), what, fix="keep one of the two")
    elif not given:
        what = f"{owner} needs `{first}` or `{second}`"
        yield wrong((first,), what, fix=f"add `{first}: ...` or `{second}: ...`")


def model_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """One origin of the weights; random weights say of what model and with what tokenizer."""
    yield from _exactly_one(raw, "name_or_path", "from_config", "`model`")
    config = raw.get("from_config")
    if not isinstance(config, dict):
        return
    if "model_type" not in config:
        what = "`from_config` has no `model_type`"
        yield wrong(("from_config",), what, fix="add for example `model_type: llama`")
    if raw.get("tokenizer") is None:
        yield wrong(
            ("from_config",),
            "a model made by `from_config` brings no tokenizer",
            fix="add `tokenizer: ...` under `model`: a path, a hub name, or `characters`",
        )


def source_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """A path or a task, with the fields that belong to it."""
    yield from _exactly_one(raw, "path", "task", "a source")
    given = _given(raw, "path", "task")
    if len(given) != 1:
        return
    foreign = ("size", "seed") if given == ["path"] else ("format", "columns")
    for field in _given(raw, *foreign):
        other = "task" if given == ["path"] else "path"
        what = f"`{field}` is for sources with `{other}`; this one has `{given[0]}`"
        fix = "use `max_rows`" if field == "size" else f"remove `{field}`"
        yield wrong((field,), what, fix=fix)


def data_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Weights for all sources or none; sampled responses need rewards and something to compare."""
    for field in ("train", "eval"):
        yield from _weight_checks(raw.get(field), field)
    if raw.get("held_out") is True and not raw.get("eval"):
        what = "`held_out` without `eval`: there are no rows that it says this of"
        yield wrong(("held_out",), what, fix="add `eval`, or remove `held_out`")
    generate = raw.get("generate")
    if not isinstance(generate, dict):
        return
    if raw.get("score") is None:
        yield wrong(
            ("generate",),
            "`generate` without `score`: sampled responses would have no rewards",
            fix="add `score: {verifier: ...}` beside `generate`",
        )
    others = [generate.get("policies", ["init"]), generate.get("endpoints", [])]
    sampled = sum(len(names) for names in others if isinstance(names, list))
    if generate.get("responses") == 1 and sampled < 2:
        yield wrong(
            ("generate", "responses"),
            "one response for each prompt gives nothing to compare",
            fix="write 2 or more",
        )


def _weight_checks(sources: object, field: str) -> Iterator[InitErrorDetails]:
    """A source without a weight has no defined share among others that have one."""
    if not isinstance(sources, list):
        return
    weighted = [isinstance(s, dict) and s.get("weight") is not None for s in sources]
    if any(weighted) and not all(weighted):
        yield wrong(
            (field, weighted.index(False)),
            "this source has no `weight`, others of the mixture have one",
            fix="give every source of the mixture a weight, or none",
        )


def eval_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Rewards need responses; of this policy, from a verifier."""
    yield from _weight_checks(raw.get("data"), "data")
    score, generate = raw.get("score"), raw.get("generate")
    if isinstance(score, dict) and score.get("verifier") is None:
        what = "an evaluation is scored by a verifier"
        yield wrong(("score",), what, fix="write `score: {verifier: ...}`")
    elsewhere = isinstance(generate, dict) and generate.get("policies", ["init"]) != ["init"]
    if isinstance(generate, dict) and (elsewhere or generate.get("endpoints")):
        field = "policies" if elsewhere else "endpoints"
        what = f"an evaluation samples from the policy that the stage has made, not from `{field}`"
        yield wrong(("generate", field), what, fix=f"remove `{field}`")
    if raw.get("score") is not None and raw.get("generate") is None:
        yield wrong(
            ("score",),
            "`score` without `generate`: there are no responses to score",
            fix="add `generate: {max_new_tokens: ...}` beside `score`",
        )


def stage_checks(raw: Mapping[str, Any], own: frozenset[str]) -> Iterator[InitErrorDetails]:
    """`own`: the names of all fields of this kind of stage."""
    if len(_given(raw, "num_train_epochs", "max_steps")) == 2:
        yield wrong(
            ("max_steps",),
            "`num_train_epochs` and `max_steps` are both given",
            why="each of them says how long the stage is",
            fix="keep one of the two",
        )
    yield from _warmup_checks(raw)
    yield from _batch_checks(raw)
    yield from _training_args_checks(raw, own)
    yield from _data_of_kind_checks(raw)
    smoothing = raw.get("label_smoothing")
    if raw.get("loss_type") == "ipo" and isinstance(smoothing, float) and smoothing > 0:
        yield wrong(
            ("label_smoothing",),
            "`label_smoothing` has no meaning for `loss_type: ipo`",
            fix="remove it, or use `loss_type: dpo`",
        )


def _warmup_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    warmup, steps = raw.get("warmup_steps"), raw.get("max_steps")
    if not _whole(warmup) or warmup is None or warmup <= 0:
        return
    if isinstance(steps, int) and _whole(steps) and warmup > steps:
        yield wrong(
            ("warmup_steps",),
            f"`warmup_steps` is {warmup}, longer than the stage, whose `max_steps` is {steps}",
            fix=f"write at most {steps}, or raise `max_steps`",
        )
    if raw.get("lr_scheduler_type", "constant") == "constant":
        yield wrong(
            ("warmup_steps",),
            "`lr_scheduler_type: constant` has no warm-up; `warmup_steps` would be ignored",
            fix="write `lr_scheduler_type: constant_with_warmup`",
        )


def _batch_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    total, micro = raw.get("global_batch_size"), raw.get("micro_batch_size", 1)
    if raw.get("micro_batch_tokens") is not None:
        return  # any number of examples is dealt out
    if not (isinstance(total, int) and isinstance(micro, int)) or total < 1 or micro < 1:
        return
    if total % micro:
        below, above = total // micro * micro, (total // micro + 1) * micro
        nearest = f"{below} or {above}" if below else str(above)
        yield wrong(
            ("global_batch_size",),
            f"`global_batch_size` {total} is not a multiple of `micro_batch_size` {micro}",
            fix=f"write {nearest}, or another `micro_batch_size`",
        )


def _training_args_checks(
    raw: Mapping[str, Any], own: frozenset[str]
) -> Iterator[InitErrorDetails]:
    arguments = raw.get("training_args")
    if not isinstance(arguments, dict):
        return
    for key in arguments:
        if key not in own and key not in OTHER_NAMES:
            continue
        name = OTHER_NAMES.get(key, f"`{key}`")
        place = "instead" if key in OTHER_NAMES else "of the stage, not under `training_args`"
        yield wrong(
            ("training_args", key),
            f"`{key}` does not belong in `training_args`: the recipe has its own field for it",
            fix=f"use {name} {place}",
        )
    if arguments.get("bf16") is True and arguments.get("fp16") is True:
        yield wrong(
            ("training_args", "fp16"),
            "`bf16` and `fp16` are both on",
            fix="keep `bf16: true` where the hardware has it, else `fp16: true`",
        )


def _data_of_kind_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Parts of `data` that only some kinds of stage read."""
    data, kind = raw.get("data"), raw.get("kind")
    if not isinstance(data, dict):
        return
    no_pairs = kind == "sft" or raw.get("objective") == "regression"
    unread: tuple[str, ...] = PREFERENCE_DATA if no_pairs else ()
    unread += () if kind == "sft" else ("replay",)
    unread += () if kind == "reward" else ("eval_share",)
    for field in _given(data, *unread):
        kinds = {"replay": "sft", "eval_share": "reward"}.get(
            field, "dpo, rpo or reward (bradley_terry)"
        )
        what = f"`data.{field}` is for stages of kind {kinds}; this one is {kind}"
        yield wrong(("data", field), what, fix=f"remove `{field}`")
    pairs, generate = data.get("pairs"), data.get("generate")
    if not isinstance(pairs, dict) or pairs.get("select") != "all_responses":
        return
    responses = generate.get("responses", 4) if isinstance(generate, dict) else None
    loss = raw.get("objective") if kind == "reward" else raw.get("loss_type")
    if kind in ("dpo", "reward") or (loss in PAIR_LOSSES and responses not in (None, 2)):
        name = loss or kind
        yield wrong(
            ("data", "pairs", "select"),
            f"`select: all_responses` gives more than two responses; the loss `{name}` takes two",
            fix="write `select: best_worst`, or use `rpo_bwd_kl` or `rpo_sqloo` in an rpo stage",
        )


def recipe_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Names of stages and the references between them."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    named = [
        (i, s)
        for i, s in enumerate(stages)
        if isinstance(s, dict) and isinstance(s.get("name"), str)
    ]
    taken: set[str] = set()
    for i, stage in named:
        for name in dict.fromkeys([stage["name"], *expanded_names(stage)]):
            if name in taken:
                yield wrong(
                    ("stages", i, "name"),
                    f"two stages have the name `{name}`",
                    fix="give each stage a name of its own; `repeat` makes name-1, name-2, ...",
                )
                break
            taken.add(name)
        if stage["name"] in (*ANY_PLACE, "init", *RUN_FILES):
            yield wrong(
                ("stages", i, "name"),
                f"`{stage['name']}` cannot be the name of a stage: it has another meaning",
                fix="choose another name",
            )
    for i, stage in enumerate(stages):
        if isinstance(stage, dict):
            earlier = [s for j, s in named if j < i]
            yield from _reference_checks(i, stage, earlier, [s for _, s in named])


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
        yield wrong(at, what, fix="name an earlier sft stage")


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
            f"`{field}` refers to `{target}`, a reward stage, which leaves no policy",
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
    if target in stage_names(every):
        what = f"`{field}` refers to `{target}`, which is not earlier in the chain"
        yield wrong(at, what, fix=fix, why="a stage can only use what is there when it starts")
        return
    near = did_you_mean(target, [*words, *before])
    hint = f"; did you mean `{near}`?" if near else ""
    yield wrong(at, f"`{field}` refers to `{target}`, which is not a stage{hint}", fix=fix)
