"""The metric by which the best checkpoint is chosen: known before training, whatever the eval sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from rpo_trainer.errors import RecipeError

# What transformers adds to the metrics of an evaluation
_SPEED = ("runtime", "samples_per_second", "steps_per_second")
_MEMORY = "mem_"  # of its memory figures, with `skip_memory_metrics=False`


def require_best_metric(
    args: Any, metrics: Mapping[str | None, Collection[str]], *, asked: bool = False
) -> None:
    """Raises RecipeError where `metric_for_best_model` names no metric of the evaluation.

    Args:
        args: a config.
        metrics: names that an evaluation has, without the prefix, by eval set; None: one without a name.
        asked: whether the model's config asks for the loss of its routers, which is then a metric too.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    named = None not in metrics
    routers = {"loss/router_aux"} if args.router_aux_loss_coef or asked else set()
    known = []
    for one, own in metrics.items():
        prefix = "eval_" if one is None else f"eval_{one}_"
        rest = name.removeprefix(prefix)
        memory = rest.startswith(_MEMORY) and not args.skip_memory_metrics
        if rest != name and (rest in own or rest in routers or rest in _SPEED or memory):
            return
        known += [prefix + metric for metric in sorted(own)]
    near = get_close_matches(name, known, n=3, cutoff=0.5) or known[:6]
    raise RecipeError(
        f"metric_for_best_model: the evaluation has no metric {name}",
        where="metric_for_best_model",
        why="with several eval sets, metric names include the set's name" if named else None,
        fix=f"write one of its metrics, such as {', '.join(near)}",
    )
