"""`main` and the commands on recipes and runs: arguments only. The commands import torch when they run."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from rpo_trainer import __version__
from rpo_trainer.cli.arguments import (
    OVERRIDES,
    overrides_argument,
    recipe_argument,
    run_argument,
    run_dir_option,
)
from rpo_trainer.cli.compare import compare
from rpo_trainer.cli.convert import convert
from rpo_trainer.cli.init import init
from rpo_trainer.cli.inspect_recipe import COMMANDS as RECIPE_COMMANDS
from rpo_trainer.cli.json_output import (
    JsonState,
    collecting,
    error_objects,
    json_option,
    status_content,
)
from rpo_trainer.cli.rewards import COMMANDS as REWARD_COMMANDS
from rpo_trainer.cli.watch import watch
from rpo_trainer.errors import RPOTrainerError, RunError, error_text, suggestion
from rpo_trainer.recipe import expand_stages, json_schema, load_recipe, shipped
from rpo_trainer.recipe.schema import STAGE_KINDS
from rpo_trainer.redact import (
    RedactingHandler,
    redact,
    redact_all_records,
    redacted_traceback,
)
from rpo_trainer.runtime.files import refusal
from rpo_trainer.runtime.harmless_lines import hide_harmless_lines
from rpo_trainer.runtime.terminal import TerminalHandler, fitted


class _Commands(click.Group):
    """Commands; the message about an unknown command names the most similar one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = suggestion(name, self.list_commands(ctx))
            ctx.fail(f"No such command {name!r}{near or '.'}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rpo-trainer")
@click.option("-v", "--verbose", is_flag=True, help="Also show debug messages.")
@click.option(
    "--local_rank", type=int, hidden=True, expose_value=False
)  # passed by the launcher of DeepSpeed
def cli(verbose: bool) -> None:
    """Preference fine-tuning of language models: SFT, DPO, RPO and reward models.

    A recipe (YAML) describes the model, the data and the training stages. Write one with `init`, convert
    one of another tool with `convert`, or start from one that `recipes` lists.
    """
    _show_messages(verbose)


@cli.command(context_settings=OVERRIDES)
@recipe_argument
@overrides_argument
@run_dir_option
@click.option("--no-report", is_flag=True, help="Do not write report.html at the end.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Delete the previous run in the run directory, and start from the beginning.",
)
@click.option(
    "--allow-changed",
    "allowed",
    multiple=True,
    metavar="KEY",
    help="Resume even though this key of the recipe, or a key below it, has changed, such as "
    "stages.dpo.beta or stages.dpo. Can be repeated.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read the content of all inputs, outputs and checkpoints of the run, not only of files whose "
    "size or modification time has changed.",
)
def run(
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    no_report: bool,
    overwrite: bool,
    allowed: Sequence[str],
    verify: bool,
) -> None:
    """Run all stages of a recipe, or resume the run.

    The same command resumes a run that was stopped. OVERRIDES change values of RECIPE, such as
    stages.dpo.beta=0.005 or --stages.dpo.beta 0.005.
    """
    if overwrite and allowed:
        raise click.UsageError(
            "--allow-changed and --overwrite cannot be combined: one resumes a run, the other deletes it."
        )
    if overwrite and verify:
        raise click.UsageError(
            "--verify and --overwrite cannot be combined: one checks the files of a run, the other deletes "
            "them."
        )
    _run(recipe, overrides, run_dir, None, not no_report, allowed, overwrite, verify)


@cli.command()
@run_argument
@json_option()
@click.option("--watch", "watched", is_flag=True, help="Refresh until the run ends.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="With --watch: time between refreshes.",
)
def status(run_dir: Path, as_json: bool, watched: bool, interval: float) -> None:
    """Show the progress and results of a run.

    RUN is the run directory.
    """
    if as_json and watched:
        raise click.UsageError("--json and --watch cannot be combined.")
    if watched:
        watch(run_dir, interval)
    elif as_json:
        with collecting(as_json, run_dir=str(run_dir)) as content:
            from rpo_trainer.report.collect import collect_run

            content |= status_content(collect_run(run_dir), run_dir)
    else:
        _table(run_dir)


@cli.command()
@run_argument
def report(run_dir: Path) -> None:
    """Write report.html for a run, finished or not.

    RUN is the run directory; the report is written into it.
    """
    from rpo_trainer.report import build_report

    click.echo(f"report: {build_report(run_dir)}")


@cli.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@cli.command()
@click.argument("name", required=False)
@click.option(
    "--copy", metavar="DIR", type=click.Path(path_type=Path), help="Copy all recipes to DIR."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="With --copy: replace files with the same names in an existing DIR.",
)
def recipes(name: str | None, copy: Path | None, overwrite: bool) -> None:
    """List, print or copy the recipes that come with the package.

    With NAME, prints this recipe.
    """
    if name is not None and copy is not None:
        raise click.UsageError("--copy copies all recipes; it cannot be combined with NAME.")
    if overwrite and copy is None:
        raise click.UsageError("--overwrite requires --copy.")
    if name is not None:
        click.echo(shipped.text_of(name), nl=False)
    elif copy is not None:
        click.echo(f"copied to {shipped.copy_to(copy, overwrite=overwrite)}")
    else:
        _list(shipped.shipped())


for _command in (init, convert, *RECIPE_COMMANDS, compare, *REWARD_COMMANDS):
    cli.add_command(_command)


def _stage_command(kind: str) -> Callable[..., None]:
    title = "reward model" if kind == "reward" else kind.upper()
    text = f"Run one {title} stage of a recipe.\n\nThe stages that it depends on must be finished."

    @cli.command(kind, context_settings=OVERRIDES, help=text)
    @recipe_argument
    @overrides_argument
    @run_dir_option
    @click.option(
        "--stage",
        metavar="NAME",
        help=f"Name of the stage, if the recipe has several of kind {kind}.",
    )
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
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    loaded = load_recipe(recipe, overrides)  # before torch is imported, to show errors immediately
    from transformers.utils.logging import disable_progress_bar

    from rpo_trainer.chain import run_chain, select_stage
    from rpo_trainer.report import build_report

    disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar per file
    name = expand_stages(loaded.recipe)[-1].name if only is None else select_stage(loaded, *only)
    folder = run_chain(
        loaded, run_dir, only=None if only is None else {name}, allow_changed=allowed,
        overwrite=overwrite, verify=verify,
    )  # fmt: skip
    if _rank("RANK") != 0:
        return
    _table(folder)
    click.echo(f"model: {folder / name / 'final'}")
    if with_report:
        try:
            click.echo(f"report: {build_report(folder)}")
        except RunError as error:  # the chain is finished; the extra `report` may be missing
            click.echo(fitted(f"no report: {error}", sys.stderr), err=True)


def _list(found: Mapping[str, str]) -> None:
    """Print names and descriptions in two columns, wrapped at words in a terminal."""
    if sys.stdout.isatty():
        formatter = click.HelpFormatter(width=shutil.get_terminal_size().columns)
        formatter.write_dl(list(found.items()), col_max=32)
        click.echo(formatter.getvalue(), nl=False)
        return
    width = max(map(len, found))
    for name, sentence in found.items():
        click.echo(f"{name:{width}}  {sentence}")


def _rank(name: str) -> int:
    """Return the rank set by the launcher: RANK over all processes, LOCAL_RANK on this host."""
    return int(os.environ.get(name, 0))


def _table(run_dir: Path) -> None:
    from rich.console import Console

    from rpo_trainer.report import status_view
    from rpo_trainer.report.collect import collect_run

    Console(highlight=False).print(status_view(collect_run(run_dir)))


def _show_messages(verbose: bool) -> None:
    handler = TerminalHandler()
    if not verbose:
        hide_harmless_lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("rpo_trainer")
    package.handlers = [RedactingHandler(), handler]
    level = logging.DEBUG if verbose else logging.INFO
    package.setLevel(level if _rank("RANK") == 0 else logging.ERROR)
    package.propagate = False


def _redact_output() -> None:
    """Redact secrets in the log messages of all libraries and in tracebacks of threads."""
    redact_all_records()

    def show_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "a thread"
            where = redact(f"Exception in {name}:")
            sys.stderr.write(f"{where}\n{redacted_traceback(args.exc_value)}")

    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = show_of_thread


def main(args: Sequence[str] | None = None) -> Any:
    """Entry point. User errors are printed without a traceback and set the exit code."""
    _redact_output()
    try:
        code = _exit_code(args)
    except Exception as error:
        # A bug. Print it here: its traceback would keep the process group alive.
        click.echo(redacted_traceback(error), err=True, nl=False)
        code = 1
    if "torch.distributed" in sys.modules:
        from rpo_trainer.runtime import distributed

        if not distributed.end():
            distributed.exit_at_once(code)
    sys.exit(code)


def _exit_code(args: Sequence[str] | None) -> int:
    """Run a command; print its error, also as JSON with `--json`; return the exit code."""
    state = JsonState()
    try:
        cli(args=list(args) if args is not None else None, standalone_mode=False, obj=state)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        shown = _file_system_error(error) or error
        if state.requested and _rank("RANK") == 0:
            state.print_errors(error_objects(shown))
        return _show_error(shown)
    return 0


def _show_error(error: BaseException) -> int:
    """Print an error to stderr and return its exit code; re-raise a bug."""
    if isinstance(error, click.ClickException):
        text = io.StringIO()
        error.show(file=text)
        click.echo(fitted(redact(text.getvalue().rstrip("\n")), sys.stderr), err=True)
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    if isinstance(error, RPOTrainerError):
        if _rank("LOCAL_RANK") == 0 or not error.everywhere:
            click.echo(error_text(error, sys.stderr), err=True)
        return error.exit_code
    raise error


def _file_system_error(error: BaseException) -> RunError | None:
    """Return the RunError of a file system error (disk full, no permission), or None for others."""
    if not isinstance(error, OSError | RuntimeError) or (reason := refusal(error)) is None:
        return None
    return RunError(
        f"file system error: {reason}",
        code="run.file-system",
        where=getattr(error, "filename", None),
        why="the command reads or writes there",
        fix="free disk space or fix the permissions, and run the same command again",
    )
