"""`--json`: one object on stdout, also if a command fails; everything else goes to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rpo_trainer.errors import Problems, RPOTrainerError

if TYPE_CHECKING:
    from rpo_trainer.plan import Plan
    from rpo_trainer.recipe import LoadedRecipe
    from rpo_trainer.report.collect import RunResults, StageResults

F = TypeVar("F", bound=Callable[..., Any])


class JsonState:
    """Whether the command was called with `--json`, and its results before an error.

    Attributes:
        requested: set as soon as the option is parsed.
        content: keys of the object other than `ok` and `errors`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.content: dict[str, Any] = {}

    def print_result(self) -> None:
        """Print the object of a command that succeeded."""
        _print({"ok": True, **self.content, "errors": []})

    def print_errors(self, errors: Sequence[Mapping[str, Any]]) -> None:
        """Print the object of a command that failed."""
        _print({"ok": False, **self.content, "errors": list(errors)})


def json_option(help: str = "Print one JSON object, errors included.") -> Callable[[F], F]:
    """`--json`, passed as `as_json`; errors of the command are then also printed as JSON."""

    def note(context: click.Context, _: click.Parameter, value: bool) -> bool:
        state_of(context).requested = value
        return value

    return click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=note, help=help
    )  # eager: errors of the other arguments are also printed as JSON


def state_of(context: click.Context) -> JsonState:
    """Return the state of the running command."""
    return context.find_root().ensure_object(JsonState)


@contextmanager
def collecting(as_json: bool, **content: Any) -> Iterator[dict[str, Any]]:
    """Collect the content of the object and print it at the end; other output goes to stderr.

    Args:
        as_json: False: print nothing.
        content: keys that are known from the start, and also printed with errors.
    """
    state = state_of(click.get_current_context())
    state.content = dict(content)
    if not as_json:
        yield state.content
        return
    with redirect_stdout(sys.stderr):
        yield state.content
    state.print_result()


def error_objects(error: BaseException) -> list[dict[str, Any]]:
    """Return each error with `code`, `what`, `where`, `why` and `fix`, null if absent."""
    if isinstance(error, Problems):
        return [each for problem in error.problems for each in error_objects(problem)]
    if isinstance(error, RPOTrainerError):
        return [
            {
                "code": error.code,
                "what": error.what,
                "where": error.where,
                "why": error.why,
                "fix": error.fix,
            }
        ]
    code, what, fix = "internal.error", f"{type(error).__name__}: {error}", None
    if isinstance(error, click.ClickException):
        code, what, fix = "option.usage", error.format_message(), "see the --help of the command"
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        code, what = "command.interrupted", "interrupted"
    return [{"code": code, "what": what, "where": None, "why": None, "fix": fix}]


def check_content(loaded: LoadedRecipe, lines: Sequence[str]) -> dict[str, Any]:
    """Return the lines of `check_recipe` by stage, as `notes` and `warnings`."""
    from rpo_trainer.chain.findings import WARNING
    from rpo_trainer.recipe import expand_stages

    stages = [
        {"name": stage.name, "kind": stage.kind, "notes": [], "warnings": []}
        for stage in expand_stages(loaded.recipe)
    ]
    heads = {f"{stage['name']} ({stage['kind']})": stage for stage in stages}
    current: Any = None
    for line in lines:
        if line in heads:
            current = heads[line]
            continue
        text = line.strip()
        field = "warnings" if text.startswith(WARNING) else "notes"
        current[field].append(text.removeprefix(WARNING))
    return {"stages": stages, "warnings": sum(len(stage["warnings"]) for stage in stages)}


def plan_content(plan: Plan) -> dict[str, Any]:
    """Return the content of a plan; memory and disk in bytes."""
    return {
        "engine": plan.engine,
        "devices": plan.devices,
        "parameters": plan.parameters,
        "peak_bytes": plan.peak,
        "disk_bytes": plan.disk,
        "launch": plan.launch,
        "stages": [
            {
                "name": stage.name,
                "kind": stage.kind,
                "examples": stage.examples,
                "steps": stage.steps,
                "tokens": stage.tokens,
                "upper_bound": stage.assumed,
                "seconds": stage.seconds,
                "micro_batch_tokens": stage.micro_batch_tokens,
                "idle_share": stage.idle_share,
                "peak_bytes": stage.memory.peak,
                "memory_bytes": asdict(stage.memory),
                "disk_bytes": stage.disk,
            }
            for stage in plan.stages
        ],
    }


def status_content(run: RunResults, run_dir: Path) -> dict[str, Any]:
    """Return the state of a run and its stages."""
    from rpo_trainer.runtime.lock_holder import is_running

    return {
        "name": run.name,
        "finished": run.finished,
        "running": is_running(run_dir),
        "stages": [_stage_status(stage) for stage in run.stages],
        "notes": run.notes,
    }


def _stage_status(stage: StageResults) -> dict[str, Any]:
    record = stage.record
    steps = [row["step"] for row in stage.metrics if isinstance(row.get("step"), int)]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "state": record.state,
        "step": max(steps, default=None),
        "steps": record.steps,
        "examples": record.examples,
        "seconds": record.seconds,
        "metrics": stage.metrics[-1] if stage.metrics else None,
        "evaluation": record.eval.to_json() if record.eval is not None else None,
        "warnings": [warning.to_json() for warning in record.warnings or ()],
    }


def _print(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(_finite(content), indent=1, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    """Return the value with null for NaN and infinities, which JSON does not support."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
