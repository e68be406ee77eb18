"""The command line: arguments only, no logic. No torch before a command needs it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from rpo_trainer import __version__
from rpo_trainer.cli.compare import compare
from rpo_trainer.cli.rewards import COMMANDS as REWARD_COMMANDS
from rpo_trainer.errors import RPOTrainerError, RunError
from rpo_trainer.recipe import json_schema, load_recipe, shipped
from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.redact import (
    RedactingHandler,
    redact,
    redact_all_records,
    redacted_traceback,
)
from rpo_trainer.runtime.files import refusal

_OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}

_recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
_overrides_argument = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
_run_dir_option = click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Where the run is written."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rpo-trainer")
@click.option("-v", "--verbose", is_flag=True, help="Show every message.")
@click.option("--local_rank", type=int, hidden=True, expose_value=False)  # of deepspeed's launcher
def cli(verbose: bool) -> None:
    """Preference fine-tuning: two-stage SFT, DPO with an SFT term, RPO, and the chain of them."""
    _show_messages(verbose)


@cli.command(context_settings=_OVERRIDES)
@_recipe_argument
@_overrides_argument
@_run_dir_option
@click.option("--no-report", is_flag=True, help="Write no report.html at the end.")
@click.option(
    "--allow-changed",
    "allowed",
    multiple=True,
    metavar="KEY",
    help="Go on although KEY of the recipe has changed, such as stages.dpo.beta; may be repeated.",
)
def run(
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    no_report: bool,
    allowed: Sequence[str],
) -> None:
    """Run the chain of RECIPE; run again, it resumes where it stopped.

    OVERRIDES change the recipe: stages.dpo.beta=0.005, or --stages.dpo.beta 0.005.
    """
    _run(recipe, overrides, run_dir, None, not no_report, allowed)


@cli.command(context_settings=_OVERRIDES)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@_overrides_argument
@_run_dir_option
@click.option(
    "--template",
    metavar="TOKENIZER",
    help="Directory or hub name: show what its chat template makes of seven conversations, in place of "
    "checking a recipe. Exit code 5 where one that it supports is not right.",
)
@click.option("--chat-template", help="Of --template: chatml, plain, or a Jinja file.")
@click.option(
    "--kwargs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of --template: a variable of the chat template, such as enable_thinking=false.",
)
@click.option("--json", "as_json", is_flag=True, help="Of --template: print JSON.")
def check(
    recipe: Path | None,
    overrides: Sequence[str],
    run_dir: Path | None,
    template: str | None,
    chat_template: str | None,
    kwargs: Sequence[str],
    as_json: bool,
) -> None:
    """Check RECIPE: its text, its data, tokenizer and template, disk. Loads no model."""
    if template is not None:
        if recipe is not None or run_dir is not None:
            raise click.UsageError("--template checks a tokenizer alone: leave RECIPE out.")
        _check_template(template, chat_template, kwargs, as_json)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE' (or --template TOKENIZER).")
    if chat_template is not None or kwargs or as_json:
        raise click.UsageError("--chat-template, --kwargs and --json belong to --template.")
    loaded = load_recipe(recipe, overrides)
    from rpo_trainer.chain import default_run_dir
    from rpo_trainer.chain.check import check_recipe, count_warnings

    lines = check_recipe(loaded, run_dir or default_run_dir(loaded))
    for line in lines:
        click.echo(line)
    warnings = count_warnings(lines)
    click.echo(
        f"{recipe}: OK" + (f", with {warnings} warning{'s' * (warnings > 1)}" * bool(warnings))
    )


def _check_template(
    tokenizer: str, chat_template: str | None, kwargs: Sequence[str], as_json: bool
) -> None:
    from rpo_trainer.cli.options import parse_kwargs

    given = parse_kwargs(kwargs)
    from rich.console import Console

    from rpo_trainer.stages.template_check import (
        as_dict,
        check_samples,
        load_checked,
        raise_if_wrong,
        shown,
    )

    loaded = load_checked(tokenizer, chat_template, given)
    found = check_samples(loaded, given)
    if as_json:
        click.echo(json.dumps([as_dict(one, loaded) for one in found], indent=1))
    else:
        console = Console()
        for text in shown(found, loaded, colors=console.color_system is not None):
            console.print(text, soft_wrap=True)
    raise_if_wrong(found)


@cli.command(context_settings=_OVERRIDES)
@_recipe_argument
@_overrides_argument
@_run_dir_option
@click.option(
    "--engine",
    type=click.Choice(["single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]),
    default="single",
    show_default=True,
    help="How the devices share the work.",
)
@click.option("--devices", type=click.IntRange(1), default=1, help="GPUs of all nodes together.")
@click.option("--nodes", type=click.IntRange(1), default=1, help="Machines.")
@click.option("--measure", is_flag=True, help="Time a step of each stage, with the real weights.")
def plan(
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    engine: Any,
    devices: int,
    nodes: int,
    measure: bool,
) -> None:
    """What RECIPE will need: steps, tokens, memory by part, disk, and how to start it."""
    loaded = load_recipe(recipe, overrides)
    from rich.console import Console

    from rpo_trainer.chain import default_run_dir
    from rpo_trainer.plan import plan_recipe, plan_view

    given = [] if run_dir is None else ["--run-dir", str(run_dir)]
    run_dir = run_dir or default_run_dir(loaded)
    planned = plan_recipe(
        loaded, run_dir, engine=engine, devices=devices, nodes=nodes, measure=measure,
        arguments=[*overrides, *given],
    )  # fmt: skip
    Console().print(plan_view(planned, run_dir))


@cli.command(context_settings=_OVERRIDES)
@_recipe_argument
@_overrides_argument
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True, help="Examples.")
@click.option("--stage", help="Of one stage only.")
def preview(recipe: Path, overrides: Sequence[str], count: int, stage: str | None) -> None:
    """Show examples of RECIPE as the model will get them: what is trained, what is cut."""
    loaded = load_recipe(recipe, overrides)
    from rich.console import Console

    from rpo_trainer.stages.preview import preview

    console = Console()
    for text in preview(loaded, count, stage=stage, colors=console.color_system is not None):
        console.print(text, soft_wrap=True)


@cli.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
def status(run_dir: Path) -> None:
    """Where RUN is: its stages and what they measured."""
    _table(run_dir)


@cli.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
def report(run_dir: Path) -> None:
    """Write RUN/report.html, finished or not."""
    from rpo_trainer.report import build_report

    click.echo(f"report: {build_report(run_dir)}")


@cli.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@cli.command()
@click.argument("name", required=False)
@click.option("--copy", type=click.Path(path_type=Path), help="Copy all of them to a new folder.")
def recipes(name: str | None, copy: Path | None) -> None:
    """List the recipes that come with the package, or print the one of NAME."""
    if name is not None:
        click.echo(shipped.text_of(name), nl=False)
    elif copy is not None:
        click.echo(f"copied to {shipped.copy_to(copy)}")
    else:
        found = shipped.shipped()
        width = max(map(len, found))
        for each, sentence in found.items():
            click.echo(f"{each:{width}}  {sentence}")


cli.add_command(compare)
for _command in REWARD_COMMANDS:
    cli.add_command(_command)


def _stage_command(kind: str) -> Callable[..., None]:
    @cli.command(kind, context_settings=_OVERRIDES, help=f"Run one {kind} stage of RECIPE alone.")
    @_recipe_argument
    @_overrides_argument
    @_run_dir_option
    @click.option("--stage", help="Which one, where the recipe has several.")
    def command(
        recipe: Path, overrides: Sequence[str], run_dir: Path | None, stage: str | None
    ) -> None:
        _run(recipe, overrides, run_dir, (kind, stage), with_report=False)

    return command


for _kind in STAGE_KINDS:
    _stage_command(_kind)


def _run(
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    only: tuple[str, str | None] | None,
    with_report: bool,
    allowed: Sequence[str] = (),
) -> None:
    loaded = load_recipe(recipe, overrides)  # errors of the recipe come before torch is imported
    from transformers.utils.logging import disable_progress_bar

    from rpo_trainer.chain import run_chain, select_stage
    from rpo_trainer.report import build_report

    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has one for every file
    names = None if only is None else {select_stage(loaded, *only)}
    folder = run_chain(loaded, run_dir, only=names, allow_changed=allowed)
    if _rank("RANK") != 0:
        return
    _table(folder)
    if with_report:
        try:
            click.echo(f"report: {build_report(folder)}")
        except RunError as error:  # the chain is done, also where the report's extra is missing
            click.echo(f"no report: {error}", err=True)


def _rank(name: str) -> int:
    """Of this process, as launchers tell it: RANK among all, LOCAL_RANK on this host."""
    return int(os.environ.get(name, 0))


def _table(run_dir: Path) -> None:
    from rich.console import Console

    from rpo_trainer.report import status_view

    Console().print(status_view(run_dir))


def _show_messages(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("rpo_trainer")
    package.handlers = [RedactingHandler(), handler]
    # Other processes than the first say only what ends them.
    loudness = logging.DEBUG if verbose else logging.INFO
    package.setLevel(loudness if _rank("RANK") == 0 else logging.ERROR)
    package.propagate = False


def _redact_output() -> None:
    """No keys in log messages of any library, nor in the tracebacks of threads."""
    redact_all_records()

    def show_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "a thread"
            where = redact(f"Exception in {name}:")
            sys.stderr.write(f"{where}\n{redacted_traceback(args.exc_value)}")

    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = show_of_thread


def main(args: Sequence[str] | None = None) -> Any:
    """Entry point; a user's mistake ends with its message and exit code, without a traceback."""
    _redact_output()
    try:
        code = _exit_code(args)
    except Exception as error:
        # A bug. Shown here: what its traceback refers to would keep the process group alive.
        click.echo(redacted_traceback(error), err=True, nl=False)
        code = 1
    if "torch.distributed" in sys.modules:
        from rpo_trainer.runtime import distributed

        if not distributed.end():
            distributed.exit_at_once(code)
    sys.exit(code)


def _exit_code(args: Sequence[str] | None) -> int:
    """Runs a command, shows the message that it ends with, and returns the exit code."""
    try:
        cli(args=list(args) if args is not None else None, standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        click.echo(redact(shown.getvalue()), err=True, nl=False)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except RPOTrainerError as error:
        if _rank("LOCAL_RANK") == 0 or not error.everywhere:
            click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (OSError, RuntimeError) as error:
        if (said := refusal(error)) is None:
            raise
        refused = RunError(
            f"the file system refuses: {said}",
            code="run.file-system",
            where=getattr(error, "filename", None),
            why="the command reads or writes there",
            fix="free disk space or fix the permissions, and run the same command again",
        )
        click.echo(f"error: {refused}", err=True)
        return refused.exit_code
    return 0
