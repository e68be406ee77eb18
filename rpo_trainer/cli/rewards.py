"""The commands on rewards and rows: arguments only. The commands import torch when they run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from rpo_trainer.cli.arguments import show
from rpo_trainer.cli.json_output import json_option
from rpo_trainer.cli.options import (
    given_values,
    options,
    parse_kwargs,
    service_fields,
    source_spec,
    spec_options,
    split_off,
    valid,
    weights_of,
)
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import (
    EndpointSpec,
    FilterSpec,
    GenerateSpec,
    JudgeSpec,
    PairsSpec,
    ScoreSpec,
)

if TYPE_CHECKING:
    from rpo_trainer.data.rows import SpecialTokens
    from rpo_trainer.rewards.calibrate import Calibration

SCORERS = ("verifier", "model", "endpoint", "judge")  # exactly one is required
# Fields of an endpoint whose options have another form: `--endpoint URL --name MODEL --kwargs NAME=VALUE`.
_ENDPOINT = ("url", "model", "chat_template_kwargs")
SERVICE = tuple(name for name in EndpointSpec.model_fields if name not in _ENDPOINT)
JUDGED = ("template", "max_tokens")
THRESHOLDS = ("min_chosen_reward", "min_chosen_quantile", "keep_top_fraction")

_input = click.argument("data", metavar="INPUT", type=click.Path(path_type=Path))
_output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Output file."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
_format = click.option(
    "--format", "format_", help="Format of INPUT.  [default: detected from its columns]"
)
_columns = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Name of a column in INPUT, such as prompt=question. Can be repeated.",
)
_special_tokens = click.option(
    "--special-tokens",
    type=click.Choice(["text", "parse"]),
    help="Read special tokens in the text of INPUT as plain text or as tokens.  [default: text]",
)
_kwargs = click.option(
    "--kwargs",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the chat template, such as enable_thinking=false. Can be repeated.",
)
_seed = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
)
_CHAT_TEMPLATE = "chatml, plain, or a Jinja file.  [default: the tokenizer's own]"


_source = options(_input, _format, _columns)
_service = spec_options(EndpointSpec, SERVICE)


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        show(line)


@click.command()
@_source
@_special_tokens
@_kwargs
@_output
@_overwrite
@spec_options(ScoreSpec, help={"model": "Reward model: directory or hub name."})
@click.option("--name", help="Name of the model at the endpoint.")
@spec_options(JudgeSpec, JUDGED)
@_service
def score(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    special_tokens: SpecialTokens | None,
    kwargs: Sequence[str],
    output: Path,
    overwrite: bool,
    name: str | None,
    **values: Any,
) -> None:
    """Score responses with a verifier, reward model or judge.

    INPUT has SFT rows, pairs, or rows of K responses. Choose one of --verifier, --model, --endpoint and
    --judge. The same command resumes an interrupted one. Failed rows are reported, and the output is
    written once all rows have succeeded.
    """
    from rpo_trainer.rewards.commands import score_file

    fields = given_values(values)
    service, judged = split_off(fields, SERVICE), split_off(fields, JUDGED)
    scorers = [f"--{name}" for name in SCORERS if name in fields]
    if len(scorers) != 1:
        raise RecipeError(
            f"{' and '.join(scorers)} cannot be combined" if scorers else "no scorer is given",
            code="option.not-one-scorer",
            why="rewards of different scorers have different units" if scorers else "",
            fix=f"give one of {', '.join(scorers or (f'--{name}' for name in SCORERS))}",
        )
    if judged and "judge" not in fields:
        raise RecipeError(
            "--template and --max-tokens require --judge",
            code="option.missing-companion",
            why="they configure the prompt and the answer of a judge",
            fix="add --judge URL --name MODEL, or remove them",
        )
    if name is not None and "endpoint" not in fields and "judge" not in fields:
        raise RecipeError(
            "--name requires --endpoint or --judge",
            code="option.missing-companion",
            why="it is the name of a model at an endpoint",
            fix="add --endpoint URL or --judge URL, or remove --name",
        )
    if kwargs and "verifier" in fields:
        raise RecipeError(
            "--kwargs requires --model, --endpoint or --judge",
            code="option.missing-companion",
            why="a verifier does not render a chat template",
            fix="remove --kwargs",
        )
    if "weights" in fields:
        fields["weights"] = weights_of(fields["weights"])
    rendered = kwargs
    if "endpoint" in fields:
        fields["endpoint"] = service_fields(fields["endpoint"], name, service)
    if "judge" in fields:
        # A judge reads plain text: these variables are for its own chat template.
        own = {} if not kwargs else {"chat_template_kwargs": parse_kwargs(kwargs)}
        fields["judge"] = {**service_fields(fields["judge"], name, service), **judged, **own}
        rendered = ()
    spec = valid(ScoreSpec, fields)
    if "model" in fields:
        _hide_weight_bars()
    source = source_spec(data, format_, columns, special_tokens, rendered)
    _show(score_file(source, output, spec, overwrite=overwrite))


@click.command()
@_source
@_special_tokens
@_kwargs
@_output
@_overwrite
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Model to sample from: directory or hub name. Can be repeated.",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="OpenAI-compatible endpoint (such as vLLM) to sample from; requires --name. Can be repeated.",
)
@click.option(
    "--name", "names", multiple=True, help="Name of the model at the endpoint, one per --endpoint."
)
@spec_options(GenerateSpec, without=("policies", "endpoints"))
@click.option("--chat-template", help=_CHAT_TEMPLATE)
@_seed
@_service
def generate(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    special_tokens: SpecialTokens | None,
    kwargs: Sequence[str],
    output: Path,
    overwrite: bool,
    policies: Sequence[str],
    endpoints: Sequence[str],
    names: Sequence[str],
    chat_template: str | None,
    seed: int,
    **values: Any,
) -> None:
    """Sample responses to prompts, from one or several models.

    The same command resumes an interrupted one. The responses to a prompt depend on its row id and the
    seed, not on the other rows.
    """
    from rpo_trainer.rewards.commands import generate_file

    _hide_weight_bars()
    if len(endpoints) != len(names):
        raise RecipeError(
            f"{len(endpoints)} --endpoint and {len(names)} --name",
            code="option.missing-companion",
            where="--endpoint, --name",
            why="they are matched in order",
            fix="give one --name per --endpoint",
        )
    if not policies and not endpoints:
        raise RecipeError(
            "no model to sample from is given",
            code="option.missing-policy",
            where="--policy",
            why="there is no default model",
            fix="add --policy MODEL, or --endpoint URL --name MODEL",
        )
    fields = given_values(values)
    service = split_off(fields, SERVICE)
    at = [service_fields(url, name, service) for url, name in zip(endpoints, names, strict=True)]
    spec = valid(GenerateSpec, {"policies": list(policies), "endpoints": at, **fields})
    source = source_spec(data, format_, columns, special_tokens, kwargs)
    _show(
        generate_file(
            source, output, spec, seed=seed, chat_template=chat_template, overwrite=overwrite
        )
    )


@click.command()
@_source
@_output
@_overwrite
@spec_options(PairsSpec)
@spec_options(FilterSpec, THRESHOLDS)
@_seed
def pairs(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    output: Path,
    overwrite: bool,
    seed: int,
    **values: Any,
) -> None:
    """Make preference rows from scored or ranked responses.

    The rows are pairs, or with `--select all_responses` rows of K responses.
    """
    from rpo_trainer.rewards.commands import pairs_file

    fields = given_values(values)
    passing = split_off(fields, THRESHOLDS)
    filter = valid(FilterSpec, {**passing, "reversed": "keep"}) if passing else None
    spec = valid(PairsSpec, fields)
    source = source_spec(data, format_, columns)
    _show(pairs_file(source, output, spec, filter, seed=seed, overwrite=overwrite))


@click.command()
@click.argument("data", metavar="INPUT...", nargs=-1, required=True)
@_format
@_columns
@click.option("--reward-scale", type=float, help="Value of η to evaluate.  [default: the fitted η]")
@json_option("Print JSON, errors included.")
def calibrate(
    data: Sequence[str],
    format_: str | None,
    columns: Sequence[str],
    reward_scale: float | None,
    as_json: bool,
) -> None:
    """Show the reward gaps of preference rows, and fit η to them."""
    from rpo_trainer.rewards.commands import calibrate_file

    if reward_scale is not None and not 0 < reward_scale < math.inf:
        raise RecipeError(
            f"--reward-scale must be a finite number greater than 0, got {reward_scale:g}",
            code="option.out-of-range",
            why="η multiplies the reward gaps: 0 removes them, and a negative η reverses them",
            fix="give another value, or omit it to use the fitted η",
        )
    sources = [source_spec(Path(path), format_, columns) for path in data]
    found = calibrate_file(sources, reward_scale)
    if as_json:
        click.echo(json.dumps({name: c.as_dict() for name, c in found.items()}, indent=1))
        return
    for name, calibration in found.items():
        _show_calibration(name, calibration)


def _show_calibration(name: str, found: Calibration) -> None:
    click.echo(f"{name}: {found.rows} pairs, {found.ties} ties, {found.against} reversed")
    if found.without:
        click.echo(f"  warning: {found.without} without rewards, not used")
    widest = max(count for _, _, count in found.histogram)
    for low, high, count in found.histogram:
        bar = "█" * round(30 * count / max(widest, 1))
        click.echo(f"  {low:>9.3g} to {high:<9.3g} {count:>7} {bar}")
    click.echo(
        f"  at η = {found.reward_scale:g}: {found.saturated:.1%} of the targets saturated, "
        f"{found.flat:.1%} flat"
    )
    click.echo(f"  {found.fit.line()}" if found.fit is not None else f"  no fit: {found.unfit}")
    if (warning := found.warning()) is not None:
        click.echo(f"  warning: {warning}")


@click.command()
@_source
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Held-out rows; count the prompts that are in both files.",
)
@click.option(
    "--tokenizer", help="Directory or hub name; also report lengths, truncation and chat template."
)
@click.option("--chat-template", help=_CHAT_TEMPLATE)
@_kwargs
@click.option(
    "--max-length", type=click.IntRange(2), help="Maximum length of prompt + response, in tokens."
)
@click.option(
    "--truncation",
    type=click.Choice(["drop", "truncate"]),
    default="drop",
    show_default=True,
    help="Drop or truncate longer rows.",
)
@json_option("Print JSON, errors included.")
def audit(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    against: Path | None,
    tokenizer: str | None,
    chat_template: str | None,
    kwargs: Sequence[str],
    max_length: int | None,
    truncation: Literal["drop", "truncate"],
    as_json: bool,
) -> None:  # fmt: skip
    """Count dropped rows and likely problems of a data file.

    Reports duplicates, ties, reversed rewards and length bias, and with --tokenizer truncated rows and
    parts of the rows that the chat template leaves out.
    """
    from rpo_trainer.stages.inspect_data import audit_file

    if tokenizer is None and (max_length is not None or chat_template is not None or kwargs):
        raise RecipeError(
            "--max-length, --chat-template and --kwargs require --tokenizer",
            code="option.missing-companion",
            why="lengths are counted in tokens, after the chat template is applied",
            fix="add --tokenizer MODEL, or remove them",
        )
    found = audit_file(
        source_spec(data, format_, columns, kwargs=kwargs),
        against=against,
        tokenizer=tokenizer,
        chat_template=chat_template,
        max_length=max_length,
        truncation=truncation,
    )
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        _show(found.lines())


def _hide_weight_bars() -> None:
    """Disable the progress bar of transformers for loading weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


COMMANDS = (score, generate, pairs, calibrate, audit)
