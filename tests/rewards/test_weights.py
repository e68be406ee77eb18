"""Weights of attributes: the published ones, and what does not fit."""

from __future__ import annotations

import pytest

from rpo_trainer.attributes import HELPSTEER_ATTRIBUTES, resolve_weights
from rpo_trainer.errors import RecipeError


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
    ("weights", "message"),
    [
        ("nemotron", r"(?s)published weights 'nemotron'.*nemotron-4-340b-reward"),
        ({"a": 1.0}, "no weight for b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "a weight for c, which is not an attribute"),
        ({"a": 0.0, "b": 0.0}, "all weights are 0"),
        ("nemotron-4-340b-reward", "no weight for a; no weight for b; a weight for helpfulness"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    with pytest.raises(RecipeError, match=message) as found:
        resolve_weights(weights, ["a", "b"])
    assert "reward_weights" in str(found.value)
