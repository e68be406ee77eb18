"""Options of the commands on rewards, generated from the fields of a recipe. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rpo_trainer.errors import Problems, RecipeError, RPOTrainerError
from rpo_trainer.recipe import template_kwargs
from rpo_trainer.recipe.overrides import apply_override, parse_overrides

if TYPE_CHECKING:
    from rpo_trainer.data.rows import SpecialTokens
    from rpo_trainer.recipe import SourceSpec

F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Combine decorators of a command; `--help` shows the options in this order."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def spec_options(
    spec: type[BaseModel],
    names: Collection[str] | None = None,
    *,
    without: Collection[str] = (),
    help: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Generate an option for each field of a part of a recipe, with its type, default and description.

    An option that is not given is None (a flag: False), so that the default of the field applies; see
    `given_values`. Choices and bounds of the fields are checked by `valid`.

    Args:
        names: the fields; None: all.
        without: fields to exclude.
        help: texts that replace the description of a field.

    Raises:
        TypeError: a field has a type that options do not support.
    """
    chosen = (
        spec.model_fields if names is None else {name: spec.model_fields[name] for name in names}
    )
    return options(
        *(
            _spec_option(name, field, (help or {}).get(name) or _sentence(field.description or ""))
            for name, field in chosen.items()
            if name not in without
        )
    )


def _spec_option(name: str, field: FieldInfo, help: str) -> Callable[[F], F]:
    option = f"--{name.replace('_', '-')}"
    (kind, *more) = _kinds(field.annotation)
    if kind is bool:
        return click.option(option, is_flag=True, help=help)
    if field.default is not None and not field.is_required():
        help = f"{help}  [default: {field.default}]"
    settings: dict[str, Any] = {"required": field.is_required(), "help": help}
    if get_origin(kind) is Literal:
        choices = "|".join(map(str, get_args(kind)))
        return click.option(option, metavar=f"[{choices}]", **settings)
    if get_origin(kind) is dict and more == [str]:
        return click.option(option, metavar="NAME=VALUE,...", **settings)
    if not more and kind in (int, float, str):
        return click.option(option, type=kind, **settings)
    if (
        not more
        and isinstance(kind, type)
        and issubclass(kind, BaseModel)
        and "url" in kind.model_fields
    ):
        return click.option(option, metavar="URL", **settings)
    raise TypeError(f"{name}: no option can have the type {field.annotation}")


def _kinds(annotation: Any) -> list[Any]:
    """Return the members of a union other than None, or the type itself, without `Annotated`."""
    if get_origin(annotation) in (Union, UnionType):
        return [
            kind for each in get_args(annotation) for kind in _kinds(each) if kind is not type(None)
        ]
    return [get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation]


def _sentence(description: str) -> str:
    return f"{description[:1].upper()}{description[1:]}."


def given_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `spec_options` that were given on the command line."""
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }


def split_off(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Remove the values of these names from the others, and return them."""
    return {name: values.pop(name) for name in names if name in values}


def service_fields(url: str, name: str | None, service: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an endpoint.

    Raises:
        RecipeError: the name of the model is missing.
    """
    if name is None:
        raise RecipeError(
            "the name of the model at the endpoint is missing",
            code="option.missing-companion",
            where=url,
            why="every request names a model",
            fix="add --name MODEL",
        )
    return {"url": url, "model": name, **service}


def valid(kind: type[Any], fields: dict[str, Any]) -> Any:
    """Validate options as fields of a recipe.

    Raises:
        RecipeError: the first error.
    """
    from rpo_trainer.recipe.messages import not_a_choice, why_of

    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        context = first.get("ctx", {})
        option = "--" + "-".join(str(part) for part in first["loc"][:1]).replace("_", "-")
        if first["type"] == "literal_error":
            words = not_a_choice(option, first["input"], context["expected"])
            raise RecipeError(
                words.what, code="option.invalid-choice", why=why_of(first["type"]), fix=words.fix
            ) from None
        raise RecipeError(
            context.get("what") or f"{first['msg']} ({first['input']!r})",
            code="option.invalid-value",
            where=option,
            why=context.get("why") or why_of(first["type"]),
            fix=context.get("fix") or "see --help for valid values",
        ) from None


def source_spec(
    data: Path,
    format_: str | None,
    columns: Sequence[str],
    special_tokens: SpecialTokens | None = None,
    kwargs: Sequence[str] = (),
) -> SourceSpec:
    """Return the source of a file, with `--column` as `columns` and `--kwargs` as `chat_template_kwargs`."""
    from rpo_trainer.rewards.row_files import source_of

    return source_of(data, format_, columns_of(columns), special_tokens, parse_kwargs(kwargs))


def columns_of(texts: Sequence[str]) -> dict[str, str]:
    """Return the values of `--column` as {expected name: name in the file}."""
    return dict(_assignment(text, "--column") for text in texts)


def weights_of(text: str | None) -> dict[str, float] | str | None:
    """Parse `--weights`: the name of published weights, or weights by attribute."""
    if text is None or "=" not in text:
        return text
    found: dict[str, float] = {}
    for part in text.split(","):
        name, value = _assignment(part, "--weights")
        if name in found:
            raise RecipeError(
                f"{name!r} has two weights",
                code="option.repeated-name",
                where="--weights",
                why="an attribute has one weight",
                fix="give each attribute once",
            )
        try:
            found[name] = float(value)
        except ValueError:
            raise RecipeError(
                f"{value!r} is not a number",
                code="option.not-a-number",
                where="--weights",
                why="the score of an attribute is multiplied by its weight",
                fix=f"write a number, for example {name}=0.5",
            ) from None
    return found


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (sign and name.strip() and value.strip()):
        raise RecipeError(
            f"{text!r} is not of the form name=value",
            code="option.not-an-assignment",
            where=option,
            why="both the name and the value are required",
            fix="write name=value, for example --column prompt=question or "
            "--weights helpfulness=0.5,coherence=0.5",
        )
    return name.strip(), value.strip()


def parse_kwargs(words: Sequence[str], option: str = "--kwargs") -> dict[str, Any] | None:
    """Parse variables of the form `name=value`, with values in YAML; return None if there are none.

    Raises:
        RecipeError, Problems: words that are not valid.
    """
    found: dict[str, Any] = {}
    overrides, errors = parse_overrides(words)
    for override in overrides:
        try:
            apply_override(found, override)
        except RecipeError as error:
            errors.append(error)
    problems: list[RPOTrainerError] = [
        RecipeError(
            error.what,
            code=error.code,
            where=f"{option} {(error.where or '').removeprefix('override ')}",
            why="each word sets one variable of the chat template",
            fix="write name=value, for example enable_thinking=false; values are YAML: quote text with "
            "special characters",
        )
        for error in errors
    ]
    problems += template_kwargs.problems(found, option)
    if problems:
        raise Problems(problems) if len(problems) > 1 else problems[0]
    return found or None
