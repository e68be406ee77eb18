"""The commands that inspect a recipe before a run: `check`, `plan`, `preview`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rpo_trainer.cli.arguments import (
    OVERRIDES,
    overrides_argument,
    recipe_argument,
    run_dir_option,
    show,
)
from rpo_trainer.cli.json_output import check_content, collecting, json_option, plan_content
from rpo_trainer.cli.template import check_template
from rpo_trainer.recipe import load_recipe


@click.command(context_settings=OVERRIDES)
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@overrides_argument
@run_dir_option
@click.option(
    "--template",
    metavar="TOKENIZER",
    help="Instead of RECIPE: check the chat template of this tokenizer (directory or hub name) on "
    "seven sample conversations. Exit code 5 if training and sampling differ.",
)
@click.option("--chat-template", help="With --template: chatml, plain, or a Jinja file.")
@click.option(
    "--kwargs",
    multiple=True,
    metavar="NAME=VALUE",
    help="With --template: a variable of the chat template, such as enable_thinking=false. Can be repeated.",
)
@json_option()
def check(
    recipe: Path | None,
    overrides: Sequence[str],
    run_dir: Path | None,
    template: str | None,
    chat_template: str | None,
    kwargs: Sequence[str],
    as_json: bool,
) -> None:
    """Check a recipe, its data and its models before a run.

    Reads and tokenizes the data of all stages; checks the tokenizer, the chat template, the configurations
    of the models, the disk space and the run directory. Does not load weights.
    """
    if template is not None:
        if recipe is not None or run_dir is not None:
            raise click.UsageError("--template takes no RECIPE and no --run-dir.")
        check_template(template, chat_template, kwargs, as_json)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE' (or option '--template TOKENIZER').")
    if chat_template is not None or kwargs:
        raise click.UsageError("--chat-template and --kwargs require --template.")
    with collecting(as_json, recipe=str(recipe)) as content:
        loaded = load_recipe(recipe, overrides)
        from rpo_trainer.chain import default_run_dir
        from rpo_trainer.chain.check import check_recipe, count_warnings

        run_dir = run_dir or default_run_dir(loaded)
        lines = check_recipe(loaded, run_dir)
        content |= {"run_dir": str(run_dir), **check_content(loaded, lines)}
    if as_json:
        return
    for line in lines:
        show(line)
    warnings = count_warnings(lines)
    click.echo(
        f"{recipe}: OK" + (f", with {warnings} warning{'s' * (warnings > 1)}" * bool(warnings))
    )


@click.command(context_settings=OVERRIDES)
@recipe_argument
@overrides_argument
@run_dir_option
@click.option(
    "--engine",
    type=click.Choice(["single", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]),
    default="single",
    show_default=True,
    help="Parallelism to plan for: what each device holds.",
)
@click.option(
    "--devices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Total number of devices, over all nodes.",
)
@click.option(
    "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Number of nodes."
)
@click.option(
    "--measure", is_flag=True, help="Load the weights and time a training step of each stage."
)
@json_option()
def plan(
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    engine: Any,
    devices: int,
    nodes: int,
    measure: bool,
    as_json: bool,
) -> None:
    """Estimate memory, disk space, steps and tokens of a run.

    Also prints the launch command. Reads and tokenizes the data; loads weights only with --measure.
    """
    with collecting(as_json, recipe=str(recipe)) as content:
        loaded = load_recipe(recipe, overrides)
        from rich.console import Console

        from rpo_trainer.chain import default_run_dir
        from rpo_trainer.plan import plan_recipe, plan_view

        run_dir_arguments = [] if run_dir is None else ["--run-dir", str(run_dir)]
        run_dir = run_dir or default_run_dir(loaded)
        planned = plan_recipe(
            loaded, run_dir, engine=engine, devices=devices, nodes=nodes, measure=measure,
            arguments=[*overrides, *run_dir_arguments],
        )  # fmt: skip
        content |= {"run_dir": str(run_dir), **plan_content(planned)}
    if not as_json:
        Console(highlight=False).print(plan_view(planned, run_dir))


@click.command(context_settings=OVERRIDES)
@recipe_argument
@overrides_argument
@click.option(
    "-n", "count", type=click.IntRange(1), default=3, show_default=True,
    help="Number of examples per stage.",
)  # fmt: skip
@click.option("--stage", metavar="NAME", help="Only this stage.")
@click.option(
    "--all", "every_row", is_flag=True,
    help="Read all rows, and select the examples from them: evenly spaced, and the longest.",
)  # fmt: skip
def preview(
    recipe: Path, overrides: Sequence[str], count: int, stage: str | None, every_row: bool
) -> None:
    """Show training examples of a recipe, token by token.

    Marks the tokens that are trained and those that are truncated. The examples are evenly spaced, and the
    longest, among the first 100 rows of each source (the first -n, if that is more); faults in other rows
    are found by `check`.
    """
    loaded = load_recipe(recipe, overrides)
    from rich.console import Console

    from rpo_trainer.stages.preview import preview

    console = Console()
    colors = console.color_system is not None
    for text in preview(loaded, count, stage=stage, colors=colors, every_row=every_row):
        console.print(text, soft_wrap=True)


COMMANDS = (check, plan, preview)
