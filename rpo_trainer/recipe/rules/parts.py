"""Rules on the fields of one part of a recipe, other than those made by `forms`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rpo_trainer.attributes import PRESETS, resolve_weights
from rpo_trainer.errors import RecipeError
from rpo_trainer.losses import find_loss, more_than_pairs, smoothed
from rpo_trainer.recipe.foreign_names import FOREIGN_NAMES
from rpo_trainer.recipe.rules.forms import (
    Errors,
    Raw,
    given,
    is_number,
    unread,
    wrong,
)
from rpo_trainer.recipe.template_kwargs import COLUMN, fault_of

_OF_PAIRS = "dpo, rpo or reward (bradley_terry)"
# Fields of `data` that only some kinds of stage use, and these kinds.
_KINDS_OF_DATA = {
    "filter": _OF_PAIRS, "generate": _OF_PAIRS, "score": _OF_PAIRS, "pairs": _OF_PAIRS,
    "resample": _OF_PAIRS, "responses_from": _OF_PAIRS, "replay": "sft",
}  # fmt: skip


def template_variables(raw: Raw) -> Errors:
    """`chat_template_kwargs` has valid names and values."""
    variables = raw.get(COLUMN)
    for name, value in variables.items() if isinstance(variables, dict) else ():
        if isinstance(name, str) and (fault := fault_of(name, value)) is not None:
            yield wrong((COLUMN, name), fault.what, code=fault.code, why=fault.why, fix=fault.fix)


# --- data ---


def weights_for_all(field: str) -> Any:
    """Make a rule: all sources of a mixture have a weight, or none."""

    def rule(raw: Raw) -> Errors:
        sources = raw.get(field)
        if not isinstance(sources, list):
            return
        weighted = [isinstance(s, dict) and s.get("weight") is not None for s in sources]
        if any(weighted) and not all(weighted):
            yield wrong(
                (field, weighted.index(False)),
                "this source has no `weight`, but others of the mixture have one",
                code="recipe.missing-weight",
                why="weights are relative to each other",
                fix="set `weight` for every source of the mixture, or for none",
            )

    return rule


def policies_to_sample_from(raw: Raw) -> Errors:
    """There is at least one policy or endpoint."""
    if raw.get("policies") == [] and not raw.get("endpoints"):
        yield wrong(
            ("policies",),
            "`policies` and `endpoints` are both empty",
            code="recipe.empty-field",
            why="sampling requires a policy",
            fix="add one to `policies` or `endpoints`",
        )


def two_responses(raw: Raw) -> Errors:
    """At least two responses are sampled per prompt."""
    generate = raw.get("generate")
    if not isinstance(generate, dict):
        return
    others = [generate.get("policies", ["init"]), generate.get("endpoints", [])]
    sampled = sum(len(names) for names in others if isinstance(names, list))
    sampled += generate.get("with_ground_truth") is True
    if generate.get("responses") == 1 and sampled < 2:
        yield wrong(
            ("generate", "responses"),
            "only one response per prompt is sampled",
            code="recipe.too-few-responses",
            why="a preference compares two responses",
            fix="set `responses` to 2 or more",
        )


def rows_from_one_place(raw: Raw) -> Errors:
    """Rows come either from `train` or from `responses_from`."""
    if raw.get("responses_from") is None:
        if "train" not in raw:
            yield {"type": "missing", "loc": ("train",), "input": raw}
        return
    for field in ("train", "generate", "score"):
        if raw.get(field) is not None:
            yield wrong(
                (field,),
                f"`{field}` and `responses_from` cannot be combined",
                code="recipe.conflicting-fields",
                why="`responses_from` uses the prompts and scored responses of another stage",
                fix="keep one of the two",
            )


def code_execution_allowed(raw: Raw) -> Errors:
    """`allow_code_execution` is set for the verifier `asserts`, and for no other."""
    verifier, allowed = raw.get("verifier"), raw.get("allow_code_execution")
    if verifier is None or len(given(raw, ("verifier", "model", "endpoint", "judge"))) != 1:
        return
    if verifier == "asserts" and allowed is not True:
        yield wrong(
            ("verifier",),
            "the verifier `asserts` runs code that a model has written",
            code="recipe.code-execution-not-allowed",
            why="the code can do harm; its limits on time and memory are not a sandbox",
            fix="add `allow_code_execution: true`, preferably in a container",
        )
    if verifier != "asserts" and allowed is True:
        what = f"`allow_code_execution` with the verifier `{verifier}`"
        yield unread(("allow_code_execution",), what, why="only `asserts` runs code")


def sampled_from_the_policy(raw: Raw) -> Errors:
    """An evaluation samples only from the policy of its stage."""
    own = {"policies": ["init"], "endpoints": [], "with_ground_truth": False}
    generate = raw.get("generate")
    fields = generate if isinstance(generate, dict) else {}
    for field in [f for f, only in own.items() if fields.get(f) not in (None, only)][:1]:
        what = f"`{field}` cannot be set in an evaluation"
        why = "an evaluation samples from the output of its stage"
        yield unread(("generate", field), what, why=why)


# --- stages of every kind ---


def warmup_fits(raw: Raw) -> Errors:
    """The warmup ends within the stage, and the schedule has a warmup."""
    warmup, steps = raw.get("warmup_steps"), raw.get("max_steps")
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup <= 0:
        return
    if isinstance(steps, int) and not isinstance(steps, bool) and warmup > steps:
        yield wrong(
            ("warmup_steps",),
            f"`warmup_steps` ({warmup}) is greater than `max_steps` ({steps})",
            code="recipe.warmup-too-long",
            why="the learning rate would never reach its peak",
            fix=f"set `warmup_steps` to at most {steps}, or increase `max_steps`",
        )
    if raw.get("lr_scheduler_type", "constant") == "constant":
        yield unread(
            ("warmup_steps",),
            "`lr_scheduler_type: constant` ignores `warmup_steps`",
            "write `lr_scheduler_type: constant_with_warmup`",
            why="in transformers, a constant learning rate after a warmup is a separate schedule",
        )


def batches_divide(raw: Raw) -> Errors:
    """The global batch is a multiple of the micro-batch, unless `micro_batch_tokens` is set."""
    total, micro = raw.get("global_batch_size"), raw.get("micro_batch_size", 1)
    if raw.get("micro_batch_tokens"):
        return
    if not (isinstance(total, int) and isinstance(micro, int)) or total < 1 or micro < 1:
        return
    if total % micro:
        below, above = total // micro * micro, (total // micro + 1) * micro
        nearest = f"{below} or {above}" if below else str(above)
        yield wrong(
            ("global_batch_size",),
            f"`global_batch_size` {total} is not a multiple of `micro_batch_size` {micro}",
            code="recipe.batch-not-divisible",
            why="all forward passes of all processes have the same number of examples",
            fix=f"write {nearest}, or change `micro_batch_size`",
        )


def training_args_are_others(raw: Raw, own: Collection[str]) -> Errors:
    """`training_args` has no setting that is a field of the recipe.

    Args:
        own: the fields of this kind of stage.
    """
    arguments = raw.get("training_args")
    if not isinstance(arguments, dict):
        return
    for key in arguments:
        foreign = FOREIGN_NAMES[key].training_args if key in FOREIGN_NAMES else ""
        if foreign or key in own:
            place = "instead" if foreign else "of the stage instead"
            yield wrong(
                ("training_args", key),
                f"`{key}` cannot be set in `training_args`: it is a field of the recipe",
                code="recipe.misplaced-key",
                why="the two values could contradict each other",
                fix=f"use {foreign or f'`{key}`'} {place}",
            )
    if arguments.get("bf16") is True and arguments.get("fp16") is True:
        yield wrong(
            ("training_args", "fp16"),
            "`bf16` and `fp16` are both true",
            code="recipe.conflicting-fields",
            why="autocast has one dtype",
            fix="keep `bf16: true` if the hardware supports it, else `fp16: true`",
        )


def skipped_steps(raw: Raw) -> Errors:
    """`max_skipped_steps` is set only with `on_nonfinite: skip`."""
    if raw.get("max_skipped_steps") is not None and raw.get("on_nonfinite", "stop") == "stop":
        yield unread(
            ("max_skipped_steps",),
            "`max_skipped_steps` requires `on_nonfinite: skip`",
            "write `on_nonfinite: skip`, or remove `max_skipped_steps`",
            why="otherwise the stage stops at the first non-finite step",
        )


def data_of_the_kind(raw: Raw) -> Errors:
    """`data` has no field that stages of this kind do not use."""
    data, kind = raw.get("data"), raw.get("kind")
    if not isinstance(data, dict):
        return
    of_pairs = kind != "sft" and raw.get("objective") != "regression"
    for field, kinds in _KINDS_OF_DATA.items():
        read = of_pairs if kinds == _OF_PAIRS else kind == kinds
        if not read and data.get(field) is not None:
            what = f"`data.{field}` requires a stage of kind {kinds}; this one is {kind}"
            yield unread(("data", field), what)


# --- losses ---


def smoothing_of_the_loss(raw: Raw) -> Errors:
    """Label smoothing is set only with losses that support it."""
    smoothing, loss = raw.get("label_smoothing"), find_loss(raw.get("loss_type"))
    without = loss is not None and loss.kind == "dpo" and not loss.label_smoothing
    if without and isinstance(smoothing, float) and smoothing > 0:
        yield unread(
            ("label_smoothing",),
            f"`loss_type: {raw['loss_type']}` does not support `label_smoothing`",
            f"remove it, or use `loss_type: {smoothed()}`",
            why="this loss is not a likelihood of preference labels",
        )


def responses_of_the_loss(raw: Raw) -> Errors:
    """More than two responses per prompt are used only with losses that support them."""
    data, kind = raw.get("data"), raw.get("kind")
    pairs = data.get("pairs") if isinstance(data, dict) else None
    if not isinstance(pairs, dict) or pairs.get("select") != "all_responses":
        return
    generate = data.get("generate") if isinstance(data, dict) else None
    responses = generate.get("responses", 4) if isinstance(generate, dict) else None
    name = raw.get("objective" if kind == "reward" else "loss_type") or kind
    loss = find_loss(name)
    pairs_only = kind == "reward" or (loss is not None and loss.pairs_only)
    if pairs_only and (kind != "rpo" or responses not in (None, 2)):
        yield wrong(
            ("data", "pairs", "select"),
            f"the loss `{name}` does not support `select: all_responses`",
            code="recipe.too-many-responses",
            why="it compares two responses, and rows would have more",
            fix="write `select: best_worst`, or use a loss that supports more responses: "
            + ", ".join(f"`{name}`" for name in more_than_pairs()),
        )


# --- reward stages ---


def fields_of_the_objective(raw: Raw) -> Errors:
    """The fields of the objective are set, and no others."""
    objective = raw.get("objective")
    if objective == "regression" and raw.get("attributes") is None:
        yield wrong(
            ("attributes",),
            "`objective: regression` requires `attributes`",
            code="recipe.missing-companion",
            why="each attribute is one output of the model",
            fix="add `attributes: [...]`, for example `attributes: [helpfulness]`",
        )
    foreign = {"regression": ["margin_scale"], "bradley_terry": ["attributes", "rating_range"]}
    for field in foreign.get(str(objective), ()):
        if raw.get(field) not in (None, 0):
            yield unread((field,), f"`{field}` cannot be set with `objective: {objective}`")


def saved_dtype(raw: Raw) -> Errors:
    """A stage that saves only an adapter saves it in float32."""
    peft = raw.get("peft")
    if raw.get("save_dtype", "auto") in ("auto", "float32") or not isinstance(peft, dict):
        return
    if peft.get("between_stages") == "keep" and not peft.get("merge"):
        yield unread(
            ("save_dtype",),
            "`save_dtype` is set in a stage that saves only an adapter",
            "remove it, or add `merge: true` under `peft` for a merged model in that dtype",
            why="the next stage trains this adapter further, and its weights are float32",
        )


def no_fields_of_a_policy(raw: Raw) -> Errors:
    """A reward stage has no `eval`, no adapter and no rounds."""
    if raw.get("eval") is not None:
        yield unread(
            ("eval",),
            "`eval` cannot be set in a reward stage",
            "remove it; use `data.eval` or `data.eval_fraction` for held-out rows",
            why="`eval` evaluates policies",
        )
    if raw.get("peft") is not None:
        what, why = "`peft` cannot be set in a reward stage", "reward stages train all weights"
        yield unread(("peft",), what, why=why)
    if isinstance(raw.get("repeat"), int) and raw["repeat"] > 1:
        yield unread(
            ("repeat",),
            "`repeat` cannot be set in a reward stage",
            "remove it, and increase `num_train_epochs`",
            why="every round would start from the same policy",
        )


def weights_of_the_attributes(raw: Raw) -> Errors:
    """Check `reward_weights` with `resolve_weights`, if the attributes are known."""
    weights, names = raw.get("reward_weights"), raw.get("attributes")
    known = [str(name) for name in names] if isinstance(names, list) else []
    if isinstance(weights, str):
        known = known or list(PRESETS.get(weights, ()))
    elif not (isinstance(weights, dict) and known and all(map(is_number, weights.values()))):
        return
    try:
        resolve_weights(weights, known)
    except RecipeError as error:
        yield wrong(
            ("reward_weights",), error.what, code=error.code, why=str(error.why), fix=str(error.fix)
        )


# --- adapters ---


def merge_agrees(raw: Mapping[str, Any]) -> Errors:
    """`merge` agrees with `between_stages`."""
    if raw.get("between_stages", "merge") == "merge" and raw.get("merge") is False:
        yield wrong(
            ("merge",),
            "`merge: false` contradicts `between_stages: merge`",
            code="recipe.conflicting-fields",
            why="the next stage starts from the merged model",
            fix="remove `merge`, or write `between_stages: keep`",
        )
