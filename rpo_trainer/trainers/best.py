"""The metric by which the best checkpoint is chosen: known before training, whatever the eval sets."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from rpo_trainer.errors import RecipeError

# What transformers adds to the metrics of an evaluation
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_OPEN = ("loss/", "mem_")  # further terms of a loss, and memory figures


def require_best_metric(args: Any, sets: Collection[str] | None, metrics: Collection[str]) -> None:
    """Raises RecipeError where `metric_for_best_model` names no metric of the evaluation.

    Args:
        args: a config.
        sets: names of the eval sets; None: one without a name.
        metrics: names that an evaluation has, without the prefix.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    prefixes = ["eval_"] if sets is None else [f"eval_{one}_" for one in sets]
    for prefix in prefixes:
        rest = name.removeprefix(prefix)
        if rest != name and (rest in metrics or rest in _SPEED or rest.startswith(_OPEN)):
            return
    known = [prefix + metric for prefix in prefixes for metric in sorted({"loss", *metrics})]
    near = get_close_matches(name, known, n=3, cutoff=0.5) or known[:6]
    raise RecipeError(
        f"metric_for_best_model: the evaluation has no metric {name}",
        where="metric_for_best_model",
        why=f"there are {len(prefixes)} eval sets, and the metrics of each bear its name"
        if sets is not None
        else None,
        fix=f"write one of its metrics, such as {', '.join(near)}",
    )
