"""Sizes beyond any machine's memory are refused before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest

from rpo_trainer.cli.options import valid
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import EndpointSpec, GenerateSpec, JudgeSpec, ScoreSpec
from tests.raising import raises

SERVICE = {"url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("kind", "needed", "field", "most"),
    [
        (EndpointSpec, SERVICE, "concurrency", 1024),
        (EndpointSpec, SERVICE, "timeout", 86_400.0),
        (EndpointSpec, SERVICE, "retries", 100),
        (JudgeSpec, SERVICE, "concurrency", 1024),
        (JudgeSpec, SERVICE, "max_tokens", 10_000_000),
        (GenerateSpec, {"max_new_tokens": 8}, "responses", 10_000),
        (GenerateSpec, {"max_new_tokens": 8}, "top_k", 10_000_000),
        (GenerateSpec, {"max_new_tokens": 8}, "batch_size", 100_000),
        (GenerateSpec, {}, "max_new_tokens", 10_000_000),
        (ScoreSpec, {"model": "./rm"}, "batch_tokens", 100_000_000),
    ],
)
def test_sizes_have_an_upper_bound(
    kind: type[Any], needed: dict[str, Any], field: str, most: float
) -> None:
    assert getattr(valid(kind, {**needed, field: most}), field) == most
    for size in (most + 1, type(most)(10**15)):
        option = "--" + field.replace("_", "-")
        with raises("option.invalid-value", RecipeError, where=option) as error:
            valid(kind, {**needed, field: size})
        assert f"{most:.0f}" in error.value.what
