"""The commands on rewards: arguments only. No torch before a command needs it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

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

SCORERS = ("verifier", "model", "endpoint", "judge")  # one of them gives the rewards
# Fields that the options of an endpoint say otherwise: `--endpoint URL --name MODEL --kwargs NAME=VALUE`.
_ENDPOINT = ("url", "model", "chat_template_kwargs")
SERVICE = tuple(name for name in EndpointSpec.model_fields if name not in _ENDPOINT)
JUDGED = ("template", "max_tokens")
THRESHOLDS = ("min_chosen_reward", "min_chosen_quantile", "keep_top_fraction")

_input = click.argument("data", metavar="INPUT", type=click.Path(path_type=Path))
_output = click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write."
)
_format = click.option("--format", "format_", help="Format of INPUT; else found from its columns.")
_columns = click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="A column of another name."
)
_special_tokens = click.option(
    "--special-tokens",
    type=click.Choice(["text", "parse"]),
    help="How text of special tokens in INPUT is read: as letters (default), or as the tokens.",
)
_kwargs = click.option(
    "--kwargs",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the chat template, such as enable_thinking=false; may be repeated.",
)
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)


_source = options(_input, _format, _columns)
_service = spec_options(EndpointSpec, SERVICE)


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


@click.command()
@_source
@_special_tokens
@_kwargs
@_output
@spec_options(ScoreSpec, help={"model": "A reward model: directory or hub name."})
@click.option("--name", help="The model's name at the endpoint.")
@spec_options(JudgeSpec, JUDGED)
@_service
def score(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    special_tokens: SpecialTokens | None,
    kwargs: Sequence[str],
    output: Path,
    name: str | None,
    **values: Any,
) -> None:
    """Give rewards to the responses of INPUT: SFT rows, pairs, or K responses a row.

    They come from --verifier, --model, --endpoint or --judge. Run again, it resumes where it
    stopped; a row that finally fails is reported, and nothing is written until all have succeeded.
    """
    from rpo_trainer.rewards.commands import score_file

    fields = given_values(values)
    service, judged = split_off(fields, SERVICE), split_off(fields, JUDGED)
    given = [f"--{name}" for name in SCORERS if name in fields]
    if len(given) != 1:
        raise RecipeError(
            f"{' and '.join(given)} are given" if given else "no scorer is given",
            code="option.not-one-scorer",
            why="one scorer gives the rewards: those of two have no common unit",
            fix=f"give one of {', '.join(given or (f'--{name}' for name in SCORERS))}",
        )
    if judged and "judge" not in fields:
        raise RecipeError(
            "--template and --max-tokens belong to --judge",
            code="option.missing-companion",
            why="nothing else is asked in words, so nothing would read them",
            fix="add --judge URL --name MODEL, or leave them out",
        )
    if name is not None and "endpoint" not in fields and "judge" not in fields:
        raise RecipeError(
            "--name belongs to --endpoint or --judge",
            code="option.missing-companion",
            why="it is what a server calls its model; a verifier or --model has no server",
            fix="add --endpoint URL or --judge URL, or leave it out",
        )
    if kwargs and "verifier" in fields:
        raise RecipeError(
            "--kwargs belongs to --model, --endpoint or --judge",
            code="option.missing-companion",
            why="a verifier reads the responses alone: no chat template is rendered",
            fix="leave it out",
        )
    if "weights" in fields:
        fields["weights"] = weights_of(fields["weights"])
    rendered = kwargs
    if "endpoint" in fields:
        fields["endpoint"] = service_fields(fields["endpoint"], name, service)
    if "judge" in fields:
        # A judge reads the rows as text: the variables are those of its own template.
        own = {} if not kwargs else {"chat_template_kwargs": parse_kwargs(kwargs)}
        fields["judge"] = {**service_fields(fields["judge"], name, service), **judged, **own}
        rendered = ()
    spec = valid(ScoreSpec, fields)
    if "model" in fields:
        _hide_weight_bars()
    source = source_spec(data, format_, columns, special_tokens, rendered)
    _show(score_file(source, output, spec))


@click.command()
@_source
@_special_tokens
@_kwargs
@_output
@click.option("--policy", "policies", multiple=True, help="A model: directory or hub name.")
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="A model behind an OpenAI-compatible endpoint (vLLM, say); needs --name.",
)
@click.option("--name", "names", multiple=True, help="The model's name there, one an --endpoint.")
@spec_options(GenerateSpec, without=("policies", "endpoints"))
@click.option("--chat-template", help="chatml, plain, or a Jinja file; else each policy's own.")
@_seed
@_service
def generate(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    special_tokens: SpecialTokens | None,
    kwargs: Sequence[str],
    output: Path,
    policies: Sequence[str],
    endpoints: Sequence[str],
    names: Sequence[str],
    chat_template: str | None,
    seed: int,
    **values: Any,
) -> None:
    """Sample responses to the prompts of INPUT, from one policy or from several.

    Run again, it resumes where it stopped. What a row gets depends on its id and the seed, not
    on the rows beside it.
    """
    from rpo_trainer.rewards.commands import generate_file

    _hide_weight_bars()
    if len(endpoints) != len(names):
        raise RecipeError(
            f"{len(endpoints)} endpoints and {len(names)} names",
            code="option.missing-companion",
            where="--endpoint, --name",
            why="they belong together in their order, so none may be missing",
            fix="one --name an --endpoint",
        )
    if not policies and not endpoints:
        raise RecipeError(
            "there is no policy to sample from",
            code="option.missing-policy",
            where="--policy",
            why="the responses are a model's, and none is taken unasked",
            fix="add --policy MODEL, or --endpoint URL --name MODEL",
        )
    fields = given_values(values)
    service = split_off(fields, SERVICE)
    at = [service_fields(url, name, service) for url, name in zip(endpoints, names, strict=True)]
    spec = valid(GenerateSpec, {"policies": list(policies), "endpoints": at, **fields})
    source = source_spec(data, format_, columns, special_tokens, kwargs)
    _show(generate_file(source, output, spec, seed=seed, chat_template=chat_template))


@click.command()
@_source
@_output
@spec_options(PairsSpec)
@spec_options(FilterSpec, THRESHOLDS)
@_seed
def pairs(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    output: Path,
    seed: int,
    **values: Any,
) -> None:
    """Make pairs, or rows of K responses, of the scored or ranked responses of INPUT."""
    from rpo_trainer.rewards.commands import pairs_file

    fields = given_values(values)
    passing = split_off(fields, THRESHOLDS)
    filter = valid(FilterSpec, {**passing, "reversed": "keep"}) if passing else None
    spec = valid(PairsSpec, fields)
    source = source_spec(data, format_, columns)
    _show(pairs_file(source, output, spec, filter, seed=seed))


@click.command()
@click.argument("data", metavar="INPUT...", nargs=-1, required=True)
@_format
@_columns
@click.option("--reward-scale", type=float, help="The η to look at; else the fitted one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate(
    data: Sequence[str],
    format_: str | None,
    columns: Sequence[str],
    reward_scale: float | None,
    as_json: bool,
) -> None:
    """Show what η makes of the reward gaps of INPUT, and fit one."""
    from rpo_trainer.rewards.commands import calibrate_file

    if reward_scale is not None and not 0 < reward_scale < math.inf:
        raise RecipeError(
            f"--reward-scale must be above 0, and finite, got {reward_scale:g}",
            code="option.out-of-range",
            why="η multiplies the gaps: 0 takes them away, and below 0 worse responses would be learnt",
            fix="give another, or leave it out: one is fitted",
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
        click.echo(f"  warning: {found.without} without rewards, left out")
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
    help="Rows held out: their prompts should not be in INPUT.",
)
@click.option("--tokenizer", help="Directory or hub name: lengths, truncation, template.")
@click.option("--chat-template", help="chatml, plain, or a Jinja file; else the tokenizer's own.")
@_kwargs
@click.option("--max-length", type=click.IntRange(2), help="Longest prompt + response, in tokens.")
@click.option(
    "--truncation",
    type=click.Choice(["drop", "cut"]),
    default="drop",
    help="What becomes of longer rows (drop).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def audit(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    against: Path | None,
    tokenizer: str | None,
    chat_template: str | None,
    kwargs: Sequence[str],
    max_length: int | None,
    truncation: Literal["drop", "cut"],
    as_json: bool,
) -> None:  # fmt: skip
    """Audit INPUT: what a stage would drop, and what it would learn without being told."""
    from rpo_trainer.stages.inspect_data import audit_file

    if tokenizer is None and (max_length is not None or chat_template is not None or kwargs):
        raise RecipeError(
            "--max-length, --chat-template and --kwargs need --tokenizer",
            code="option.missing-companion",
            why="a row's length is counted in tokens, after the template is applied",
            fix="add --tokenizer MODEL, or leave them out",
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
    """Turns off transformers' progress bar for each model that is loaded."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


COMMANDS = (score, generate, pairs, calibrate, audit)
