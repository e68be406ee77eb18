"""Secrets are removed from errors, log records and tracebacks, in every form."""

from __future__ import annotations

import base64
import html
import json
import logging
import subprocess
import sys
from urllib.parse import quote, quote_plus

import pytest

from rpo_trainer import redact as redacting
from rpo_trainer.errors import Problems, RecipeError
from rpo_trainer.recipe import fill_from_environment
from rpo_trainer.redact import REDACTED, hide, redact, redact_values, register, register_url

SECRET = 'p+ss/w"rd & <more>\\'


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redacting, "_registered", set())


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        f"Bearer {SECRET}",
        json.dumps({"k": SECRET}),
        json.dumps(json.dumps(SECRET)),
        repr(SECRET),
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
        quote(SECRET, safe="").lower(),
        html.escape(SECRET),
        base64.b64encode(SECRET.encode()).decode(),
    ],
)
def test_every_form_is_removed(form: str) -> None:
    assert hide(f"a {form} b", ["unlike-this"]) == f"a {form} b"
    register(SECRET)
    found = redact(f"a {form} b")
    assert REDACTED in found and "w" not in found.replace("a ", "").replace("Bearer", "").lower()
    assert found.startswith("a ") and found.endswith(" b")


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_SECRET",
     "AWS_SECRET_ACCESS_KEY"],
)  # fmt: skip
def test_variables_that_hold_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert redact("is value-of-it") == f"is {REDACTED}"
    monkeypatch.setenv(name, "short")
    assert redact("is short") == "is short"


def test_other_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_TOKENS", "twelve-or-more")
    assert redact("twelve-or-more") == "twelve-or-more"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see https://me:pw@host/v1.", f"see https://{REDACTED}@host/v1."),
        ("https://tok@host", f"https://{REDACTED}@host"),
        ("https://me:p@w@host/a@b", f"https://{REDACTED}@host/a@b"),
        ("https://h/v1?api_key=abc&x=1", f"https://h/v1?api_key={REDACTED}&x=1"),
        ("https://h/v1?x=1&token=abc", f"https://h/v1?x=1&token={REDACTED}"),
        ("(https://h/?key=abc)", f"(https://h/?key={REDACTED})"),
        ("https://host/v1?page=2, mail a@b", "https://host/v1?page=2, mail a@b"),
        ("stages.dpo.beta=0.1 key=value", "stages.dpo.beta=0.1 key=value"),
    ],
)
def test_credentials_of_urls(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_the_password_of_a_url_is_known_afterwards() -> None:
    register_url("https://me:long%2Fpassword@host")
    encoded = base64.b64encode(b"me:long/password").decode()
    assert redact(f"long/password {encoded}") == f"{REDACTED} {REDACTED}"


def test_values_of_json() -> None:
    register(SECRET)
    assert redact_values({"a": [SECRET, 1, None], "b": (SECRET,)}) == {
        "a": [REDACTED, 1, None],
        "b": [REDACTED],
    }


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_TOKEN", "the-value-in-it")
    assert fill_from_environment({"hub_token": "${RUN_TOKEN}"}, where="x") == {
        "hub_token": "the-value-in-it"
    }
    monkeypatch.delenv("RUN_TOKEN")
    said = "no the-value-in-it"
    error = RecipeError(said, code="recipe.said", where=said, why=said, fix=said)
    assert {error.what, error.where, error.why, error.fix} == {f"no {REDACTED}"}
    assert "the-value" not in str(error.at(said)) + str(error.where)
    assert "the-value" not in str(Problems([error, RecipeError(said, code="recipe.said")]))


def test_records_of_the_package(caplog: pytest.LogCaptureFixture) -> None:
    """A library user sees them through handlers of the root logger."""
    register(SECRET)
    logger = logging.getLogger("rpo_trainer.some.module")
    try:
        raise ValueError(f"bad {SECRET}")
    except ValueError:
        logger.exception("failed with %s", SECRET, stack_info=True)
    logger.warning("%d of %d", 1, 2)
    assert SECRET not in caplog.text and f"failed with {REDACTED}" in caplog.text
    assert f"ValueError: bad {REDACTED}" in caplog.text and "1 of 2" in caplog.text


def test_warnings_are_printed_where_logging_is_not_set_up() -> None:
    code = (
        "import logging, rpo_trainer\n"
        "logging.getLogger('rpo_trainer.x').warning('is %s', 'shown')\n"
        "logging.getLogger('rpo_trainer.x').info('is hidden')\n"
        "logging.basicConfig(level=logging.INFO, format='once %(message)s')\n"
        "logging.getLogger('rpo_trainer.x').warning('more')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "is shown\nonce more\n"


@pytest.mark.parametrize(
    "bug",
    [
        "raise ValueError('bad ' + os.environ['MY_API_KEY'])",
        "t = threading.Thread(target=lambda: 1 / len(os.environ['MY_API_KEY'] * 0), "
        "name=os.environ['MY_API_KEY']); t.start(); t.join(); sys.exit(1)",
        "logging.getLogger('other').error('it is %s', os.environ['MY_API_KEY']); sys.exit(1)",
        "raise click.UsageError('no ' + os.environ['MY_API_KEY'])",
    ],
    ids=["traceback", "thread", "other logger", "usage"],
)
def test_the_output_of_the_command(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-in-a-bug")
    code = (
        "import click, logging, os, sys, threading\n"
        "from rpo_trainer.cli import commands as cli\n"
        "@cli.cli.command()\n"
        f"def bug():\n    {bug}\n"
        "cli.main(['bug'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "sk-in-a-bug" not in done.stdout + done.stderr and REDACTED in done.stderr
