"""Weights of attributes: the published ones, and invalid ones."""

from __future__ import annotations

import re

import pytest

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES, resolve_weights
from rpo_trainer.errors import RecipeError
from tests.raising import raises


def test_published_weights_in_the_order_of_the_model():
    found = resolve_weights("nemotron-4-340b-reward", HELPSTEER_ATTRIBUTES)
    assert list(found.values()) == [0.3, 0.74, 0.46, 0.47, -0.33]
    backwards = resolve_weights("llama3-70b-steerlm-rm", HELPSTEER_ATTRIBUTES[::-1])
    assert list(backwards.items()) == [
        ("verbosity", -0.4),
        ("complexity", 0.55),
        ("coherence", 0.45),
        ("correctness", 0.8),
        ("helpfulness", 0.65),
    ]


def test_without_weights_the_mean():
    assert resolve_weights(None, ["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)


@pytest.mark.parametrize(
    ("weights", "code", "named"),
    [
        ("nemotron", "rewards.unknown-weights", r"'nemotron'"),
        ({"a": 1.0}, "rewards.wrong-attributes", " b$"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "rewards.wrong-attributes", "^a weight for c,[^;]*$"),
        ({"a": 0.0, "b": 0.0}, "rewards.zero-weights", "0"),
        ("nemotron-4-340b-reward", "rewards.wrong-attributes", " a; .* b; .* helpfulness"),
    ],
)
def test_weights_that_do_not_fit(weights, code, named):
    with raises(code, RecipeError, where="reward_weights") as found:
        resolve_weights(weights, ["a", "b"])
    assert re.search(named, found.value.what)
    if code == "rewards.unknown-weights":
        assert "nemotron-4-340b-reward" in str(found.value.fix)
