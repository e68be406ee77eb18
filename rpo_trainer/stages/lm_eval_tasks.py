"""Runs tasks of EleutherAI's lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_trainer.errors import RecipeError, RunError, did_you_mean, first_line
from rpo_trainer.recipe import resolve_path

if TYPE_CHECKING:
    from rpo_trainer.recipe.schema import LmEvalSpec

_Z95 = 1.959964  # the 0.975 quantile of the normal distribution
_RESAMPLES = 1000  # for metrics whose standard error has no formula
_INDEXES: dict[str | None, Any] = {}
_MAY_RUN_CODE = "HF_ALLOW_CODE_EVAL"  # required by metrics that run code


def check_tasks(spec: LmEvalSpec, base_dir: Path, *, where: str = "eval.lm_eval") -> None:
    """Check that the tasks exist and are allowed; their data is not checked.

    Raises:
        RecipeError: the extra `eval` is not installed, no such task or directory, or a task that runs
            code written by the model is not allowed.
    """
    index = _manager(spec, base_dir, where).task_index
    for name in spec.tasks:
        if name not in index:
            near = did_you_mean(name, list(index))
            raise RecipeError(
                f"lm-eval has no task {name!r}",
                code="recipe.unknown-task",
                where=f"{where}.tasks",
                fix=f"did you mean {near}?" if near else "list the tasks with `lm-eval ls tasks`, or set "
                "include_path for your own task files",
            )  # fmt: skip
        runs_code = (index[name].cfg or {}).get("unsafe_code")
        if runs_code and not spec.allow_code_execution:
            raise RecipeError(
                f"task {name} runs code written by the model",
                code="recipe.code-execution-not-allowed",
                where=f"{where}.tasks",
                why="lm-eval runs that code without a sandbox",
                fix="add `allow_code_execution: true`, and run it inside a container",
            )


def run_tasks(
    model: Any,
    tokenizer: Any,
    spec: LmEvalSpec,
    base_dir: Path,
    *,
    seed: int,
    template_kwargs: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return results by task and metric: `value`, with `low` and `high` if there is a standard error.

    For a group, its own results are returned, not those of its tasks.

    Args:
        template_kwargs: variables of the chat template, if the tasks use it.

    Raises:
        RecipeError: as `check_tasks`.
        RunError: a task fails, or its data cannot be loaded.
    """
    manager = _manager(spec, base_dir, "eval.lm_eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=spec.batch_size,
        trust_remote_code=False,
        chat_template_args=dict(template_kwargs or {}),
    )
    try:
        with _code_allowed(spec.allow_code_execution):
            found: Any = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(spec.tasks), num_fewshot=spec.num_fewshot,
                limit=spec.limit, task_manager=manager, bootstrap_iters=_RESAMPLES,
                apply_chat_template=spec.chat_template, log_samples=False,
                confirm_run_unsafe_code=spec.allow_code_execution,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed,
            )  # fmt: skip
    except Exception as error:  # any error of a task, its data set or the network
        raise RunError(
            f"lm-eval failed: {type(error).__name__}: {first_line(error)}",
            code="run.lm-eval-failed",
            where=f"eval.lm_eval.tasks: {', '.join(spec.tasks)}",
            why="tasks download their data from the hub when they start",
            fix="download the data where there is a network, or remove the task from `lm_eval`, and run the "
            "same command again: training is complete, and the run resumes here",
        ) from error  # fmt: skip
    return _figures(found)


def _manager(spec: LmEvalSpec, base_dir: Path, where: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            f"lm_eval requires the package lm-eval ({error})",
            code="recipe.missing-library",
            where=where,
            fix="pip install 'rpo-trainer[eval]'",
        ) from error
    own = None if spec.include_path is None else resolve_path(base_dir, spec.include_path)
    if own is not None and not own.is_dir():
        raise RecipeError(
            "no such directory",
            code="recipe.no-such-directory",
            where=f"{where}.include_path: {own}",
            fix="give the directory with the YAML files of your tasks",
        )
    for name in ("lm_eval", "evaluate", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    key = None if own is None else str(own)
    if key not in _INDEXES:  # reads thousands of files
        _INDEXES[key] = TaskManager(include_path=key)
    return _INDEXES[key]


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    before = os.environ.get(_MAY_RUN_CODE)
    if allowed:
        os.environ[_MAY_RUN_CODE] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ[_MAY_RUN_CODE]


def _figures(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    below = {name for names in found.get("group_subtasks", {}).values() for name in names}
    figures: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        if task in below:
            continue
        for key, value in values.items():
            metric, _, how = key.partition(",")  # "acc,none", "exact_match,strict-match"
            if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{how}")
            better = found.get("higher_is_better", {}).get(task, {}).get(metric)
            figure: dict[str, Any] = {"value": float(value), "higher_is_better": better}
            if isinstance(error, int | float) and error == error:
                half = _Z95 * float(error)
                figure |= {"low": float(value) - half, "high": float(value) + half}
            label = metric if how == "none" else f"{metric} ({how})"
            figures.setdefault(task, {})[label] = figure
    return figures
