"""Options of the command line that are generated from the fields of a recipe."""

from __future__ import annotations

from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from rpo_trainer.cli.options import given_values, spec_options, split_off
from rpo_trainer.cli.rewards import JUDGED, SERVICE, THRESHOLDS, generate, pairs, score
from rpo_trainer.recipe import EndpointSpec, GenerateSpec, PairsSpec, ScoreSpec
from rpo_trainer.recipe.schema.spec import Spec, Text


class Part(Spec):
    """One field of each type that an option can have."""

    must: int = Field(ge=1, description="how many")
    share: float | None = Field(None, description="a share")
    size: float = Field(0.5, description="`size` of it")
    name: Text | None = Field(None, description="a name")
    kind: Literal["one", "two"] = Field("one", description="which")
    flag: bool = Field(False, description="whether")
    at: EndpointSpec | None = Field(None, description="where")
    weights: dict[str, float] | Text | None = Field(None, description="weights")


def command(*decorators: Any) -> tuple[click.Command, list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []

    def run(**values: Any) -> None:
        found.append(values)

    for decorator in decorators:
        run = decorator(run)
    return click.command()(run), found


def test_a_field_becomes_an_option() -> None:
    made, found = command(spec_options(Part, help={"name": "Another text."}))
    arguments = ["--must", "3", "--share", ".25", "--kind", "two", "--flag", "--name", "n"]
    arguments += ["--at", "http://h", "--weights", "a=1"]
    assert CliRunner().invoke(made, arguments).exit_code == 0
    assert found == [
        {"must": 3, "share": 0.25, "size": None, "name": "n", "kind": "two", "flag": True,
         "at": "http://h", "weights": "a=1"}
    ]  # fmt: skip
    shown = " ".join(CliRunner().invoke(made, ["--help"]).output.split())
    for text in (
        "--must INTEGER How many. [required]", "--share FLOAT A share.",
        "--size FLOAT `size` of it. [default: 0.5]", "--name TEXT Another text.",
        "--kind [one|two] Which. [default: one]", "--flag Whether.", "--at URL Where.",
        "--weights NAME=VALUE,... Weights.",
    ):  # fmt: skip
        assert text in shown
    assert CliRunner().invoke(made, []).exit_code == 2
    assert CliRunner().invoke(made, ["--must", "x"]).exit_code == 2


def test_what_is_not_given_is_left_to_the_field() -> None:
    made, found = command(spec_options(Part))
    assert CliRunner().invoke(made, ["--must", "0"]).exit_code == 0
    given = given_values(found[0])
    assert given == {"must": 0}
    assert split_off(given, ("must", "name")) == {"must": 0} and given == {}


def test_some_fields_alone() -> None:
    names = {p.name for p in command(spec_options(Part, ("size", "kind")))[0].params}
    assert names == {"size", "kind"}
    names = {p.name for p in command(spec_options(Part, without=("must",)))[0].params}
    assert names == {*Part.model_fields} - {"must"}


def test_a_field_that_no_option_can_say_is_an_error() -> None:
    class Odd(Spec):
        parts: list[int] = Field([], description="parts")

    with pytest.raises(TypeError, match="parts"):
        spec_options(Odd)


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (score, {*ScoreSpec.model_fields, *JUDGED, *SERVICE}),
        (generate, {*GenerateSpec.model_fields, *SERVICE} - {"policies", "endpoints"}),
        (pairs, {*PairsSpec.model_fields, *THRESHOLDS}),
    ],
    ids=["score", "generate", "pairs"],
)
def test_every_field_has_its_option(command: click.Command, fields: set[str]) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in fields} <= options
