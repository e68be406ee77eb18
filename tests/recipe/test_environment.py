from __future__ import annotations

import pytest

from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import fill_from_environment
from rpo_trainer.recipe.environment import is_secret
from tests.raising import raises


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("hub_token", "x", True),
        ("token", "x", True),
        ("wandb_api_key", "x", True),
        ("apiKey", "x", True),
        ("PASSWORD", "x", True),
        ("note", "hf_abcdefghijklmnopqrstuvwx", True),
        ("hub_token", "${HF_TOKEN}", False),
        ("hub_token", None, False),
        ("max_new_tokens", "5", False),
        ("pad_token", "</s>", False),
        ("tokenizer", "characters", False),
        ("bos_token_id", 1, False),
    ],
)
def test_what_is_a_secret(key: str, value: object, secret: bool) -> None:
    assert is_secret(key, value) is secret


def test_variables_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abc")
    fields = {"hub_token": "${SOME_TOKEN}", "run_name": "a ${SOME_TOKEN}", "n": 1}
    filled = fill_from_environment(fields, where="stages.dpo.training_args")
    assert filled == {"hub_token": "abc", "run_name": "a ${SOME_TOKEN}", "n": 1}
    assert fields["hub_token"] == "${SOME_TOKEN}"


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    with raises("recipe.unset-variable", RecipeError, where="dpo") as error:
        fill_from_environment({"hub_token": "${SOME_TOKEN}"}, where="dpo")
    assert "`hub_token`" in error.value.what and "SOME_TOKEN" in error.value.what
