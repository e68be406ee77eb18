"""Errors of a recipe that concern more than one field.

The checks read raw mappings, before validation, so that they can be reported beside wrong types and
ranges; a value of a wrong type is left to its field's own error. Each yields a pydantic error at
the key to go to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from rpo_trainer.losses import find_loss, more_than_pairs, smoothed
from rpo_trainer.recipe.template_kwargs import COLUMN, fault_of

CHECK = "recipe_check"  # the error type of everything found here
PREFERENCE_KINDS = ("dpo", "rpo")
PREFERENCE_DATA = ("filter", "generate", "score", "pairs", "resample", "responses_from")
LENGTH_FIELDS = ("num_train_epochs", "max_steps")  # one setting, two spellings
# TrainingArguments fields that the recipe says in other words
OTHER_NAMES = {
    "per_device_train_batch_size": "`micro_batch_size`",
    "gradient_accumulation_steps": "`global_batch_size`; accumulation follows from it",
    "output_dir": "the recipe's `run_dir`",
    "warmup_ratio": "`warmup_steps`",
    "eval_strategy": "`eval_steps`",
    "save_strategy": "`save_steps`",
    "logging_strategy": "`logging_steps`",
    "activation_checkpointing": "`gradient_checkpointing`",
}


NOT_CONVERTED = "what is written is taken as it is, and never converted"
NOT_READ = "nothing would read it"
TOO_LARGE = "what it asks for would take all memory, or never end"


def wrong_value(what: str, fix: str, why: str | None = NOT_CONVERTED) -> PydanticCustomError:
    """An error that keeps what, why and fix apart."""
    return PydanticCustomError(CHECK, "{what}; {fix}", {"what": what, "fix": fix, "why": why})


def wrong(at: tuple[str | int, ...], what: str, *, why: str, fix: str) -> InitErrorDetails:
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


# Sizes beyond which a number is a mistake: what they ask for would take all memory, or never end.
MOST = 2**31 - 1


def size_checks(raw: Mapping[str, Any], bounded: Collection[str]) -> Iterator[InitErrorDetails]:
    """Whole numbers that are larger than any that makes sense.

    Args:
        bounded: fields whose own upper bound says so.
    """
    for key, value in raw.items():
        if _whole(value) and value > MOST and key not in bounded:
            what = f"must be at most {MOST}"
            yield wrong((key,), what, why=TOO_LARGE, fix="write a smaller number")


def named_stages(stages: Sequence[Any]) -> list[tuple[int, dict[str, Any]]]:
    """The raw stages that have a name, each with its place; others have errors of their own."""
    return [
        (i, stage)
        for i, stage in enumerate(stages)
        if isinstance(stage, dict) and isinstance(stage.get("name"), str)
    ]


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
        why = "which of the two is meant cannot be guessed"
        yield wrong((second,), what, why=why, fix="keep one of the two")
    elif not given:
        what = f"{owner} needs `{first}` or `{second}`"
        why = "nothing says where it comes from"
        yield wrong((first,), what, why=why, fix=f"add `{first}: ...` or `{second}: ...`")


def template_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Names in `chat_template_kwargs` that can be variables of a chat template."""
    given = raw.get(COLUMN)
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        if isinstance(name, str) and (fault := fault_of(name, value)) is not None:
            yield wrong((COLUMN, name), fault.what, why=fault.why, fix=fault.fix)


def model_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """One origin of the weights; random weights say of what model and with what tokenizer."""
    yield from template_checks(raw)
    yield from _exactly_one(raw, "name_or_path", "from_config", "`model`")
    config = raw.get("from_config")
    if not isinstance(config, dict):
        return
    if "model_type" not in config:
        what = "`from_config` has no `model_type`"
        why = "it says which of transformers' model classes is made"
        yield wrong(("from_config",), what, why=why, fix="add for example `model_type: llama`")
    if raw.get("tokenizer") is None:
        yield wrong(
            ("from_config",),
            "`from_config` without `tokenizer`",
            why="a model with random weights brings none, as a directory or a name on the hub does",
            fix="add `tokenizer: ...` under `model`: a path, a hub name, or `characters`",
        )


def source_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """A path or a task, with the fields that belong to it."""
    yield from template_checks(raw)
    yield from _exactly_one(raw, "path", "task", "a source")
    given = _given(raw, "path", "task")
    if len(given) != 1:
        return
    foreign = ("size", "seed") if given == ["path"] else ("format", "columns", "special_tokens")
    for field in _given(raw, *foreign):
        other = "task" if given == ["path"] else "path"
        what = f"`{field}` is for sources with `{other}`; this one has `{given[0]}`"
        fix = "use `max_rows`" if field == "size" else f"remove `{field}`"
        yield wrong((field,), what, why=NOT_READ, fix=fix)


def data_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Weights for all sources or none; sampled responses need rewards and something to compare."""
    for field in ("train", "eval"):
        yield from weight_checks(raw.get(field), field)
    if raw.get("held_out") is True and not raw.get("eval"):
        what, why = "`held_out` without `eval`", "there are no rows that it says this of"
        yield wrong(("held_out",), what, why=why, fix="add `eval`, or remove `held_out`")
    generate = raw.get("generate")
    if not isinstance(generate, dict):
        return
    if raw.get("score") is None:
        yield wrong(
            ("generate",),
            "`generate` without `score`",
            why="sampled responses would have no rewards, so that none is better than another",
            fix="add `score: {verifier: ...}` beside `generate`",
        )
    others = [generate.get("policies", ["init"]), generate.get("endpoints", [])]
    sampled = sum(len(names) for names in others if isinstance(names, list))
    sampled += generate.get("with_ground_truth") is True
    if generate.get("responses") == 1 and sampled < 2:
        yield wrong(
            ("generate", "responses"),
            "one response for each prompt",
            why="a preference takes two, to be compared",
            fix="write 2 or more",
        )


def weight_checks(sources: object, field: str) -> Iterator[InitErrorDetails]:
    """A source without a weight has no defined share among others that have one."""
    if not isinstance(sources, list):
        return
    weighted = [isinstance(s, dict) and s.get("weight") is not None for s in sources]
    if any(weighted) and not all(weighted):
        yield wrong(
            (field, weighted.index(False)),
            "this source has no `weight`, others of the mixture have one",
            why="its share beside theirs is not defined",
            fix="give every source of the mixture a weight, or none",
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
    if raw.get("max_skipped_steps") is not None and raw.get("on_nonfinite", "stop") == "stop":
        yield wrong(
            ("max_skipped_steps",),
            "`max_skipped_steps` with `on_nonfinite: stop`",
            why="the stage stops at the first such step, so none is left out",
            fix="write `on_nonfinite: skip`, or remove it",
        )
    yield from _warmup_checks(raw)
    yield from _batch_checks(raw)
    yield from _training_args_checks(raw, own)
    yield from _data_of_kind_checks(raw)
    smoothing, loss = raw.get("label_smoothing"), find_loss(raw.get("loss_type"))
    without = loss is not None and loss.kind == "dpo" and not loss.label_smoothing
    if without and isinstance(smoothing, float) and smoothing > 0:
        yield wrong(
            ("label_smoothing",),
            f"`label_smoothing` with `loss_type: {raw['loss_type']}`",
            why="it is the share of wrong labels in a likelihood of labels, which this loss is not",
            fix=f"remove it, or use `loss_type: {smoothed()}`",
        )


def _warmup_checks(raw: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    warmup, steps = raw.get("warmup_steps"), raw.get("max_steps")
    if not _whole(warmup) or warmup is None or warmup <= 0:
        return
    if isinstance(steps, int) and _whole(steps) and warmup > steps:
        yield wrong(
            ("warmup_steps",),
            f"`warmup_steps` is {warmup}, longer than the stage, whose `max_steps` is {steps}",
            why="the learning rate would never reach its peak",
            fix=f"write at most {steps}, or raise `max_steps`",
        )
    if raw.get("lr_scheduler_type", "constant") == "constant":
        yield wrong(
            ("warmup_steps",),
            "`lr_scheduler_type: constant` has no warm-up; `warmup_steps` would be ignored",
            why="transformers has a schedule of its own for a constant rate behind a warm-up",
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
            why="every forward pass of every process holds the same number of examples",
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
            why="one setting in two places could not say which of them holds",
            fix=f"use {name} {place}",
        )
    if arguments.get("bf16") is True and arguments.get("fp16") is True:
        yield wrong(
            ("training_args", "fp16"),
            "`bf16` and `fp16` are both on",
            why="the arithmetic is in one of them",
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
    unread += () if kind == "reward" else ("eval_fraction",)
    for field in _given(data, *unread):
        kinds = {"replay": "sft", "eval_fraction": "reward"}.get(
            field, "dpo, rpo or reward (bradley_terry)"
        )
        what = f"`data.{field}` is for stages of kind {kinds}; this one is {kind}"
        yield wrong(("data", field), what, why=NOT_READ, fix=f"remove `{field}`")
    pairs, generate = data.get("pairs"), data.get("generate")
    if not isinstance(pairs, dict) or pairs.get("select") != "all_responses":
        return
    responses = generate.get("responses", 4) if isinstance(generate, dict) else None
    name = raw.get("objective" if kind == "reward" else "loss_type") or kind
    loss = find_loss(name)
    pairs_only = kind == "reward" or (loss is not None and loss.pairs_only)
    if pairs_only and (kind != "rpo" or responses not in (None, 2)):
        yield wrong(
            ("data", "pairs", "select"),
            f"`select: all_responses` with the loss `{name}`",
            why="that gives more than two responses a prompt, and this loss takes two",
            fix="write `select: best_worst`, or train with a loss of more responses: "
            + ", ".join(f"`{name}`" for name in more_than_pairs()),
        )
